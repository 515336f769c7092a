"""One run on several processes: the process group, how a process joins it, and the gradients that it sums."""
