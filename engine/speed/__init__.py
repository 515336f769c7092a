"""Ways to make a step fast that leave the algorithm alone; options.py has the list."""
