"""Objectives: each returns sums and the weight to divide them by, once."""
