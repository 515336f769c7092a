"""Adversarial robustness distillation, fast and fair."""

__version__ = "0.1.0"
