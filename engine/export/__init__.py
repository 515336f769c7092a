"""A network for others to load: weights in a known form, with a model card."""
