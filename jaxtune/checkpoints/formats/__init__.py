"""File formats of weights, plain and quantized."""
