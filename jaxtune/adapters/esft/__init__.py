"""ESFT: training of chosen routed experts."""
