"""Objectives. Each returns sums over a batch and the weight by which to divide them."""
