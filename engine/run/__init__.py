"""One run: its folder, its state, what ends it early, and the loop that drives it."""
