"""Mixtures of experts: routing, grouped products and their kernels, expert parallelism."""
