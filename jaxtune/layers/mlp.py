"""Feed-forward blocks."""

from __future__ import annotations

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxtune.layers.context import Context
from jaxtune.layers.linear import Linear


class MLP(nnx.Module):
    """The gated feed-forward block down(silu(gate(x)) · up(x)). Source: Shazeer, 2020 (SwiGLU)."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool = False):
        self.gate_proj = Linear(hidden_size, intermediate_size, axes=("mlp", "embed"), bias=bias)
        self.up_proj = Linear(hidden_size, intermediate_size, axes=("mlp", "embed"), bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, axes=("embed", "mlp"), bias=bias)

    @property
    def activation_width(self) -> int:
        """Values per token within the layer: gate, up and their product."""
        return 3 * self.gate_proj.out_features

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Maps x [B, T, hidden] to [B, T, hidden]."""
        gate = checkpoint_name(self.gate_proj(x, context.key_for("gate_proj")), "gate_proj")
        up = checkpoint_name(self.up_proj(x, context.key_for("up_proj")), "up_proj")
        return self.down_proj(jax.nn.silu(gate) * up, context.key_for("down_proj"))
