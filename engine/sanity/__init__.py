"""Checks for masked gradients: flags, gradient probes and a ladder of attacks whose order is known."""
