"""Networks on disk and by name: checkpoint files, their headers, published networks, and other people's code."""
