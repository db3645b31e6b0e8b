"""Adapters on disk: PEFT's format, its variants for other programs, and combinations."""

from __future__ import annotations

from collections.abc import Callable

from jaxtune.adapter_files.fused import fuse
from jaxtune.adapter_files.vllm import check_vllm, for_vllm
from jaxtune.adapters.merge import check_merges
from jaxtune.adapters.method import Method, StoredAdapter
from jaxtune.errors import JaxtuneError
from jaxtune.models.definition import Definition

# Conversions of a stored adapter to the form that another program loads, given the base model.
EXPORTS: dict[str, Callable[[StoredAdapter, Definition], StoredAdapter]] = {
    "peft": fuse,
    "vllm": for_vllm,
}


def refused_exports(method: Method, definition: Definition) -> dict[str, str]:
    """Returns the formats of `jaxtune export` that will refuse an adapter, with the reasons.

    The checks are those of the exports themselves; nothing has to be trained yet.

    Args:
      method: method with its settings.
      definition: definition of the model with the method attached.
    """
    if not method.has_adapter:
        return {}  # only the whole model can be exported
    checks: dict[str, Callable[[], object]] = {
        "vllm": lambda: check_vllm(method.outline(definition)),
        "merged": lambda: check_merges(method),
    }
    refused: dict[str, str] = {}
    for name, check in checks.items():
        try:
            check()
        except JaxtuneError as error:
            refused[name] = str(error)
    return refused
