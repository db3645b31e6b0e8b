"""The sections ``model``, ``quantize`` and ``mesh``: the base model, its weights and devices."""

from __future__ import annotations

import dataclasses

from jaxtune.config.option import Section, option
from jaxtune.registry import ATTENTION_BACKENDS, WEIGHT_FORMATS


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    """The ``model`` section: the base model."""

    path: str = option("", "Hugging Face directory, hub id or .gguf file of the base model")
    revision: str = option("", "commit, tag or branch of a hub id; empty: the default branch")
    attention: str = option(
        "auto",
        "attention backend: auto (by platform), xla, blockwise, cudnn or splash",
        choices=("auto", *ATTENTION_BACKENDS),
    )


@dataclasses.dataclass(frozen=True)
class QuantizeConfig(Section):
    """The ``quantize`` section: the weight format of the frozen base."""

    format: str = option(
        "",
        "weight format of the frozen base: nf4, int4, int8 or fp8; empty: training.dtype",
        choices=("", *WEIGHT_FORMATS),
    )
    modules: tuple[str, ...] = option(
        ("all-linear",),
        "modules to quantize, named as in adapter.targets; all-linear excludes the head (the "
        "embedding, norms and routers are never quantized)",
        names=True,
    )
    double: bool = option(True, "nf4: quantize the scales too")
    group_size: int = option(64, "int4: columns that share a scale; 0: a whole row", minimum=0)
    symmetric: bool = option(True, "int4: groups have no zero point")


@dataclasses.dataclass(frozen=True)
class MeshConfig(Section):
    """The ``mesh`` section: devices along each axis.

    Sizes in a config file shrink to what the devices allow; those on the command line are kept.
    """

    data: int = option(
        -1, "number of devices that split the batch; -1: all others", minimum=-1, nonzero=True
    )
    fsdp: int = option(
        1, "number of devices that split batch and weights", minimum=-1, nonzero=True
    )
    tensor: int = option(
        1, "number of devices that split heads and hidden units", minimum=-1, nonzero=True
    )
    expert: int = option(
        1, "number of devices that split batch and routed experts", minimum=-1, nonzero=True
    )
    sequence: int = option(1, "number of devices that split the sequence", minimum=-1, nonzero=True)

    def to_dict(self) -> dict[str, int]:
        """Returns the number of devices by axis."""
        return dataclasses.asdict(self)
