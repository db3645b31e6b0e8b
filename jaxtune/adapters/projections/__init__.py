"""Methods that edit projections, and the modules, tokens and biases trained with them."""
