"""jaxtune: fine-tune DeepSeek models with JAX on TPUs, GPUs and plain CPUs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtune.api import Model, Run, Sampling, convert, load, train
    from jaxtune.errors import JaxtuneError

__all__ = ["JaxtuneError", "Model", "Run", "Sampling", "convert", "load", "train"]


def __getattr__(name: str) -> Any:
    # Importing jax takes seconds, which `jaxtune --help` and a typing error need not wait for.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "jaxtune.errors" if name == "JaxtuneError" else "jaxtune.api"
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
