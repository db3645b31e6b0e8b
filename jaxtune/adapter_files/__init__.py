"""Adapters on disk: PEFT's format, its variants for other programs, and combinations."""

from __future__ import annotations

from collections.abc import Callable

from jaxtune.adapter_files.fused import fuse
from jaxtune.adapter_files.vllm import for_vllm
from jaxtune.adapters.method import StoredAdapter
from jaxtune.models.definition import Definition

# Conversions of a stored adapter to the form that another program loads, given the base model.
EXPORTS: dict[str, Callable[[StoredAdapter, Definition], StoredAdapter]] = {
    "peft": fuse,
    "vllm": for_vllm,
}
