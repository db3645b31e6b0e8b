"""How long a step takes at least, and about how long it will take."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxtune.planning.devices import Chip
from jaxtune.planning.flops import StepFlops

# Shares of a chip's peaks that good programs reach. Of the products: jaxtune's own are not measured
# on accelerators yet; published training runs use 41-46 % of the peak for model operations
# (NeMo on H100s, MaxText on v6e), of which recomputation is a part that is not counted.
PRODUCTS, MEMORY, LINKS = 0.5, 0.8, 0.8


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Time of one update.

    Attributes:
      products: seconds of a device's matrix products at its peak.
      memory: seconds to read and write what these products take and give, at its peak.
      links: seconds to send what collectives send, at their peak.
      seconds: about how long an update takes: the slowest of the three at `PRODUCTS`, `MEMORY` and
        `LINKS` of the peaks, the others hidden behind it.
      tokens_per_second: over all devices.
    """

    products: float
    memory: float
    links: float
    seconds: float
    tokens_per_second: float

    @property
    def at_best(self) -> float:
        """Seconds of an update that nothing can beat: the slowest of the three at its peak."""
        return max(self.products, self.memory, self.links)

    @property
    def bound(self) -> str:
        """What takes longest."""
        parts = {
            "products": self.products / PRODUCTS,
            "memory": self.memory / MEMORY,
            "links": self.links / LINKS,
        }
        return max(parts, key=lambda name: parts[name])


def estimate(chip: Chip, flops: StepFlops, mesh: Mapping[str, int], sent: float) -> Estimate:
    """Estimates the time of an update.

    Args:
      chip: what each device is.
      flops: of the step, over all devices.
      mesh: devices along each mesh axis.
      sent: bytes that each device sends in collectives.
    """
    devices = 1
    for size in mesh.values():
        devices *= size
    products = flops.hardware / devices / chip.flops
    # Tensor parallelism splits a weight for good; devices along other axes each read the whole.
    read = flops.weight_bytes / mesh.get("tensor", 1) + flops.other_bytes / devices
    memory, links = read / chip.memory_bandwidth, sent / chip.link_bandwidth
    seconds = max(products / PRODUCTS, memory / MEMORY, links / LINKS)
    return Estimate(products, memory, links, seconds, flops.tokens / seconds)


def assumptions(chip: Chip) -> list[str]:
    """Says what the estimate takes for granted, a line each."""
    return [
        f"peaks of the {chip.name}: {chip.flops / 1e12:g} TFLOP/s bfloat16, "
        f"{chip.memory_bandwidth / 1e9:g} GB/s memory, {chip.link_bandwidth / 1e9:g} GB/s links "
        f"one way ({chip.source})",
        f"reached: {PRODUCTS:.0%} of the first, {MEMORY:.0%} of the second, {LINKS:.0%} of the "
        "third, each hidden behind the slowest",
        "weights are read once per product in the computation's dtype, and a ring carries "
        "collectives over all links; data loading takes no time",
    ]
