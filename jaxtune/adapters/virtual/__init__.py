"""Methods that add virtual tokens or small networks to the model."""
