"""jaxtune: fine-tune DeepSeek models with JAX on TPUs, GPUs and plain CPUs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaxtune.environment import silence_unused

if TYPE_CHECKING:
    from jaxtune.api import Model, Run, Sampling, convert, load, train
    from jaxtune.errors import JaxtuneError
    from jaxtune.log_output import enable_logging
    from jaxtune.training.loop.callbacks import Callback, Event
    from jaxtune.training.scores import register_score

__all__ = [
    "Callback",
    "Event",
    "JaxtuneError",
    "Model",
    "Run",
    "Sampling",
    "convert",
    "enable_logging",
    "load",
    "register_score",
    "train",
]

# Modules that import no jax; the other names are in jaxtune.api.
_LIGHT = {
    "Callback": "jaxtune.training.loop.callbacks",
    "Event": "jaxtune.training.loop.callbacks",
    "JaxtuneError": "jaxtune.errors",
    "enable_logging": "jaxtune.log_output",
    "register_score": "jaxtune.training.scores",
}

silence_unused()


def __getattr__(name: str) -> Any:
    # Importing jax takes seconds, which `jaxtune --help` and a typing error need not wait for.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LIGHT.get(name, "jaxtune.api")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
