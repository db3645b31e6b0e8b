"""Formats of quantized weights on disk, shared with other tools.

A format is one file, with a line in `READERS` and one in `WRITERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune.checkpoints.formats import bitsandbytes, compressed_tensors, deepseek_fp8
from jaxtune.checkpoints.formats.safetensors import Pending
from jaxtune.checkpoints.source import TensorSource
from jaxtune.quant import Format


class FormatReader(NamedTuple):
    """Functions that read one kind of quantized checkpoint.

    Attributes:
      open: maps a source of the tensors on disk to a source of the model's weights in float32.
      form: returns the weight format, given the ``quantization_config`` and its directory.
    """

    open: Callable[[TensorSource], TensorSource]
    form: Callable[[Mapping[str, Any], Path], Format]


class FormatWriter(NamedTuple):
    """Functions that write a weight format.

    Attributes:
      settings: returns the ``quantization_config``, given the format, the names of modules with
        plain weights, and the dtype of these.
      tensors: returns the tensors of a weight [out, in] by name, given the name of its module, the
        format, the shape, the dtype of plain weights, and a function that returns a part, by key,
        as a host array.
    """

    settings: Callable[[Any, Sequence[str], str], dict[str, Any]]
    tensors: Callable[
        [str, Any, tuple[int, int], str, Callable[[str], np.ndarray]], dict[str, Pending]
    ]


READERS: dict[str, FormatReader] = {
    deepseek_fp8.METHOD: FormatReader(deepseek_fp8.Float8Source, deepseek_fp8.deepseek_fp8_format),
    bitsandbytes.METHOD: FormatReader(
        bitsandbytes.open_bitsandbytes, bitsandbytes.bitsandbytes_format
    ),
    compressed_tensors.METHOD: FormatReader(
        compressed_tensors.PackedInt4Source, compressed_tensors.compressed_tensors_format
    ),
}
"""Readers by ``quant_method`` of config.json."""

WRITERS: dict[str, FormatWriter] = {
    "nf4": FormatWriter(bitsandbytes.nf4_settings, bitsandbytes.nf4_tensors),
    "int8": FormatWriter(bitsandbytes.int8_settings, bitsandbytes.int8_tensors),
    "int4": FormatWriter(compressed_tensors.int4_settings, compressed_tensors.int4_tensors),
    "fp8": FormatWriter(deepseek_fp8.fp8_settings, deepseek_fp8.fp8_tensors),
}
"""Writers by name of the weight format."""
