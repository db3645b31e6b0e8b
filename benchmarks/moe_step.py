"""Compares the time of a mixture of 64 experts with one of 8: forward and backward pass.

    python benchmarks/moe_step.py [--rounds 7] [--hidden 256] [--width 128] [--top-k 4]

Both mixtures have the same tokens and the same number of experts per token, with four full tiles of
rows for each of 64 experts on average. Steps are timed alternately, so that changes in the speed of
the machine affect both. Prints the seconds, their ratio and the number of tiles, for frozen and for
trained weights. The ratio should be within 25 % of 1.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.layers.context import Context
from jaxtune.layers.experts.grouped import MAX_TILE, group
from jaxtune.layers.experts.moe import MoE, Routing
from jaxtune.layers.tree import bind, flatten, unflatten, variables

FEW, MANY = 8, 64


class Mixture:
    """A mixture with random weights, its input, and its compiled step."""

    def __init__(self, experts: int, options: argparse.Namespace, *, trained: bool):
        tokens = 4 * MAX_TILE * MANY // options.top_k
        module = MoE(options.hidden, options.width, Routing(experts, options.top_k), 0)
        graphdef, keys = nnx.graphdef(module), iter(jax.random.split(jax.random.key(0), 9))

        def draw(shape: tuple[int, ...]) -> jax.Array:
            return jax.random.normal(next(keys), shape) * shape[-1] ** -0.5

        weights = unflatten({p: draw(v.get_value().shape) for p, v in variables(module)})
        x = jax.random.normal(next(keys), (1, tokens, options.hidden))
        place = jnp.zeros((1, tokens), jnp.int32)
        context = Context(x, x, place, place, 0, None, "xla", jnp.float32)

        def loss(x: jax.Array, weights: dict) -> jax.Array:
            return jnp.mean(bind(graphdef, weights)(x, context) ** 2)

        self._step = jax.jit(jax.grad(loss, (0, 1) if trained else 0))
        self._arguments = (x, weights)
        _, chosen = bind(graphdef, weights).gate(x[0])
        groups = group(chosen.reshape(-1), experts)
        self.tiles, self.ideal = int(groups.tiles), -(-chosen.size // groups.tile)
        self.weights = sum(leaf.size for _, leaf in flatten(weights))
        self()

    def __call__(self) -> float:
        """Runs a step and returns its duration in seconds."""
        start = time.perf_counter()
        jax.block_until_ready(self._step(*self._arguments))
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=4)
    options = parser.parse_args()
    for trained in (False, True):
        mixtures = {n: Mixture(n, options, trained=trained) for n in (FEW, MANY)}
        seconds: dict[int, list[float]] = {n: [] for n in mixtures}
        for _ in range(options.rounds):
            for n, mixture in mixtures.items():
                seconds[n].append(mixture())
        median = {n: statistics.median(times) for n, times in seconds.items()}
        print("trained weights" if trained else "frozen weights")
        for n, mixture in mixtures.items():
            print(
                f"  {n:>3} experts {median[n]:>8.3f} s {mixture.tiles:>5} tiles "
                f"(ideal {mixture.ideal}, at most {n} more) {mixture.weights:>12,} weights"
            )
        print(f"  ratio {median[MANY] / median[FEW]:.2f} (bar: within 25 % of 1)")


if __name__ == "__main__":
    main()
