"""Proof without the weights: full-size models of random weights, on videos of the sizes that artists work at."""
