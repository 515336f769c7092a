"""A trained network in the forms that others take: safetensors with a model card, and RobustBench's."""
