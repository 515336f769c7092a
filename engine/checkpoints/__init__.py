"""Where networks come from and go to: checkpoints, runs, foreign code, teachers, exports."""
