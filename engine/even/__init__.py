"""Evening: what makes the classes of a trained network more equal under attack, in two epochs or in none."""
