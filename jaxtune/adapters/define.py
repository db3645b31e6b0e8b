"""A model with its method: the one place where an architecture and a method meet."""

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
    """Describes the model of a config.json with a method attached; nothing is allocated.

    Args:
      config: the content of config.json.
      dtype: of frozen weights; whatever is trained is float32.
      method: None for the bare base model.
      quantization: of frozen weights; None for none.

    Raises:
      JaxtuneError: a setting that is not supported, or a target that matches nothing.
    """
    model = build_model(config)
    if method is None:
        return Definition(config, model, dtype, formats=_formats(model, quantization).get)
    method.attach(model)
    # Afterwards, because a method may have split the blocks.
    formats = _formats(model, quantization)
    return Definition(config, model, dtype, method.trains, formats.get)


def _formats(model: CausalLM, quantization: Quantization | None) -> dict[Path, Format]:
    """Returns the format of each quantized weight by path."""
    if quantization is None:
        return {}
    modules = {p: m for p, m in model.projections().items() if not m.is_router}
    names = {path: module_names(path, module) for path, module in modules.items()}
    every = [name for layers in names.values() for name in layers]
    chosen = match_targets(quantization.modules, every, key="quantize.modules")
    formats: dict[Path, Format] = {}
    for path, layers in names.items():
        inside = [name for name in layers if name in chosen]
        if not inside:
            continue
        if len(inside) < len(layers):
            outside = next(name for name in layers if name not in chosen)
            raise JaxtuneError(
                f"quantize.modules: has {inside[0]} and not {outside}; layers of equal structure "
                "are quantized together"
            )
        formats[(*path, "weight")] = quantization.format
    return formats
