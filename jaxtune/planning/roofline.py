"""Time of a step by a roofline model: a lower bound, and an estimate."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxtune.parallel.devices import Chip
from jaxtune.planning.flops import StepFlops

# Fractions of a chip's peaks that good programs reach. Published training runs use 41-46 % of the
# peak FLOP/s for model operations, not counting recomputation (NeMo on H100s, MaxText on v6e).
# jaxtune's own are not measured on accelerators yet.
PRODUCTS, MEMORY, LINKS = 0.5, 0.8, 0.8


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Time of one step.

    Attributes:
      products: seconds of a device's matrix products at its peak FLOP/s.
      memory: seconds to read and write the operands of these products at peak bandwidth.
      links: seconds to send the data of collectives at peak bandwidth.
      seconds: estimated time: the slowest of the three at the fractions `PRODUCTS`, `MEMORY` and
        `LINKS` of the peaks, which hides the others.
      tokens_per_second: over all devices.
    """

    products: float
    memory: float
    links: float
    seconds: float
    tokens_per_second: float

    @property
    def at_best(self) -> float:
        """Lower bound in seconds: the slowest of the three at its peak."""
        return max(self.products, self.memory, self.links)

    @property
    def bound(self) -> str:
        """The slowest of the three: "products", "memory" or "links"."""
        parts = {
            "products": self.products / PRODUCTS,
            "memory": self.memory / MEMORY,
            "links": self.links / LINKS,
        }
        return max(parts, key=lambda name: parts[name])


def estimate(chip: Chip, flops: StepFlops, mesh: Mapping[str, int], sent: float) -> Estimate:
    """Estimates the time of a step.

    Args:
      chip: specification of each device.
      flops: operations of the step, over all devices.
      mesh: devices along each mesh axis.
      sent: bytes that each device sends in collectives.
    """
    devices = 1
    for size in mesh.values():
        devices *= size
    products = flops.hardware / devices / chip.flops
    # Tensor parallelism splits the weight of a product; devices along other axes read it whole.
    read = flops.weight_bytes / mesh.get("tensor", 1) + flops.other_bytes / devices
    memory, links = read / chip.memory_bandwidth, sent / chip.link_bandwidth
    seconds = max(products / PRODUCTS, memory / MEMORY, links / LINKS)
    return Estimate(products, memory, links, seconds, flops.tokens / seconds)


def assumptions(chip: Chip) -> list[str]:
    """Returns the assumptions of the estimate, one line each."""
    return [
        f"peaks of the {chip.name}: {chip.flops / 1e12:g} TFLOP/s bfloat16, "
        f"{chip.memory_bandwidth / 1e9:g} GB/s memory, {chip.link_bandwidth / 1e9:g} GB/s links "
        f"one way ({chip.source})",
        f"reached: {PRODUCTS:.0%} of the first, {MEMORY:.0%} of the second, {LINKS:.0%} of the "
        "third, each hidden behind the slowest",
        "weights are read once per product in the computation's dtype, and a ring carries "
        "collectives over all links; data loading takes no time",
    ]
