"""Robustness by class: the attacks, AutoAttack with a ledger, the checks of both, and the statistics."""
