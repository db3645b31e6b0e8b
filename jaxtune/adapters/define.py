"""A model with its method: the one place where an architecture and a method meet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax.typing import DTypeLike

from jaxtune.adapters.method import Method
from jaxtune.models import build_model
from jaxtune.models.definition import Definition


def define(config: Mapping[str, Any], dtype: DTypeLike, method: Method | None = None) -> Definition:
    """Describes the model of a config.json with a method attached; nothing is allocated.

    Args:
      config: the content of config.json.
      dtype: of frozen weights; whatever is trained is float32.
      method: None for the bare base model.

    Raises:
      JaxtuneError: a setting that is not supported, or a target that matches nothing.
    """
    model = build_model(config)
    if method is None:
        return Definition(config, model, dtype)
    method.attach(model)
    return Definition(config, model, dtype, method.trains)
