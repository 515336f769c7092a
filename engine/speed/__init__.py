"""What makes a step fast and leaves the algorithm alone (moves.py has the list)."""
