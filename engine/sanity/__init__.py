"""Checks of an evaluation's numbers: for masked gradients, and by attacks whose order of strength is known."""
