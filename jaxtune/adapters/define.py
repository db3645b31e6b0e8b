"""Combines an architecture and a method into an abstract model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax.typing import DTypeLike

from jaxtune.adapters.method import Method
from jaxtune.adapters.targets import match_targets, module_names
from jaxtune.errors import JaxtuneError
from jaxtune.layers.decoder import CausalLM
from jaxtune.layers.tree import Path
from jaxtune.models import build_model
from jaxtune.models.definition import Definition
from jaxtune.quant import Format, Quantization


def define(
    config: Mapping[str, Any],
    dtype: DTypeLike,
    method: Method | None = None,
    quantization: Quantization | None = None,
) -> Definition:
    """Returns the abstract model of a config.json with a method attached; allocates nothing.

    Args:
      config: the content of config.json.
      dtype: dtype of frozen weights; trained weights are float32.
      method: the fine-tuning method; None for the base model alone.
      quantization: weight format of frozen projections; None to leave them plain.

    Raises:
      JaxtuneError: a setting that is not supported, or a target that matches nothing.
    """
    model = build_model(config)
    if method is None:
        return Definition(config, model, dtype, formats=_formats(model, quantization).get)
    method.attach(model)
    # Formats are assigned by path, and paths change when a method splits the blocks.
    formats = _formats(model, quantization)
    return Definition(config, model, dtype, method.trains, formats.get)


def _formats(model: CausalLM, quantization: Quantization | None) -> dict[Path, Format]:
    """Returns the format of each quantized weight by path.

    Raises:
      JaxtuneError: only some layers of a block are selected; a block is one stacked array.
    """
    if quantization is None:
        return {}
    modules = {p: m for p, m in model.projections().items() if not m.is_router}
    names = {path: module_names(path, module) for path, module in modules.items()}
    all_names = [name for layers in names.values() for name in layers]
    chosen = match_targets(quantization.modules, all_names, key="quantize.modules")
    formats: dict[Path, Format] = {}
    for path, layers in names.items():
        inside = [name for name in layers if name in chosen]
        if not inside:
            continue
        if len(inside) < len(layers):
            outside = next(name for name in layers if name not in chosen)
            raise JaxtuneError(
                f"quantize.modules: selects {inside[0]} but not {outside}; layers of equal "
                "structure are quantized together"
            )
        formats[(*path, "weight")] = quantization.format
    return formats
