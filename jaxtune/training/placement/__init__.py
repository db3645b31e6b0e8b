"""How a run is spread over its devices: mesh, micro-batches and memory."""
