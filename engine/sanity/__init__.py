"""Whether the numbers of an evaluation can be trusted: masked gradients, and attacks whose order is known."""
