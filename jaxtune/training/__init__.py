"""The training step, its optimizer and the loop around it."""
