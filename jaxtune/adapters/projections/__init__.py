"""Methods that edit projections, and what they train beside them."""
