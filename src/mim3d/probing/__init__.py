"""What frozen features are worth: a linear and a nearest-neighbour classifier on them, and measures of collapse."""
