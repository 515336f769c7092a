"""What makes a step fast and leaves the algorithm alone; options.py has the list."""
