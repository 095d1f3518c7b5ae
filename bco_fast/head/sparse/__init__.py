"""The certified sparse backward: which blocks of the gradient to compute, and how each backend computes them."""
