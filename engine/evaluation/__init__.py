"""Evaluation: a network attacked and reported by class, AutoAttack with a ledger, and comparisons of two networks."""
