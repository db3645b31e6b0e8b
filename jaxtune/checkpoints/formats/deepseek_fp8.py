"""DeepSeek's block-scaled fp8 checkpoints: dequantized as they are read, and written.

A weight W of type float8_e4m3fn comes with ``W_scale_inv``, float32: one value for each block of
128 rows and 128 columns, ragged blocks at the edges included. The weight is ``float32(W) × scale``
of its block: it multiplies, whatever the name says.

Source: the inference code of DeepSeek-V3 and its config.json (``weight_block_size``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxtune.checkpoints.formats.safetensors import Pending
from jaxtune.checkpoints.source import ALL, TensorSource
from jaxtune.errors import JaxtuneError
from jaxtune.quant.fp8 import Float8
from jaxtune.quant.weight import Format

METHOD = "fp8"
SUFFIX = "_scale_inv"
# Every float8_e4m3fn value by its bits: a look-up is several times faster than a cast.
_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def dequantize(weight: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Returns float32 [rows, columns] of a block-scaled weight.

    Args:
      weight: float8_e4m3fn [rows, columns].
      scale: float32 [⌈rows / block rows⌉, ⌈columns / block columns⌉].
      block: (rows, columns) that share a scale.
    """
    bits, out = weight.view(np.uint8), np.empty(weight.shape, np.float32)
    # By rows of blocks: look-ups take 8 bytes of index per value, and so stay within a cache.
    for first in range(0, weight.shape[0], block[0]):
        rows = slice(first, first + block[0])
        across = np.repeat(scale[first // block[0]], block[1])[: weight.shape[1]]
        np.multiply(np.take(_VALUES, bits[rows]), across, out=out[rows])
    return out


class Float8Source:
    """A checkpoint in block-scaled fp8, which reads as one in float32."""

    def __init__(self, source: TensorSource):
        """Pairs weights with their scales.

        Raises:
          JaxtuneError: a setting that is not known, or a weight whose scale is missing or of the
            wrong shape.
        """
        self._source = source
        self.path: Path = source.path
        self.config = source.config
        self._block = block_size(self.config["quantization_config"], self.path)
        present = set(source.names())
        self._scaled = {name for name in present if name + SUFFIX in present}
        scales = {name + SUFFIX for name in self._scaled}
        self._names = [name for name in source.names() if name not in scales]
        for name in self._names:
            self._check(name)

    def _check(self, name: str) -> None:
        source = self._source
        dtype = source.dtype(name)
        if name not in self._scaled:
            if dtype == np.dtype(ml_dtypes.float8_e4m3fn):
                raise JaxtuneError(f'{source.where(name)}: "{name}" is fp8 and has no {SUFFIX}')
            return
        if dtype != np.dtype(ml_dtypes.float8_e4m3fn):
            raise JaxtuneError(f'{source.where(name)}: "{name}" is {dtype}, yet has a {SUFFIX}')
        if source.dtype(name + SUFFIX) != np.float32:
            raise JaxtuneError(
                f'{source.where(name)}: "{name}{SUFFIX}" is {source.dtype(name + SUFFIX)}, '
                "not float32"
            )
        shape, scale = source.shape(name), source.shape(name + SUFFIX)
        wanted = tuple(-(-n // block) for n, block in zip(shape, self._block, strict=False))
        if len(shape) != 2 or scale != wanted:
            raise JaxtuneError(
                f'{source.where(name)}: "{name}{SUFFIX}" is {list(scale)}, not {list(wanted)}'
            )

    def names(self) -> list[str]:
        """Returns the names of all tensors but the scales."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape."""
        return self._source.shape(name)

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype that `read` gives: float32 for a scaled weight."""
        return np.dtype(np.float32) if name in self._scaled else self._source.dtype(name)

    def read(self, name: str, rows: slice = ALL) -> np.ndarray:
        """Returns a tensor of the shape `shape(name)`, or rows of it, dequantized if scaled."""
        value = self._source.read(name)
        if name not in self._scaled:
            return value[rows] if value.ndim else value
        first, last, _ = rows.indices(value.shape[0])
        block = first // self._block[0]
        start = block * self._block[0]  # rows of a block share their scales
        scale = self._source.read(name + SUFFIX)[block:]
        return dequantize(value[start:last], scale, self._block)[first - start :]

    def read_parts(self, name: str, form: Format) -> dict[str, np.ndarray] | None:
        """Returns bytes [rows, columns] and scales as they are on disk, if in such blocks."""
        if name not in self._scaled or form != Float8(self._block):
            return None
        codes, scale = self._source.read(name), self._source.read(name + SUFFIX)
        return {"codes": codes.view(np.uint8), "scale": scale}

    def where(self, name: str) -> str:
        """Returns the file that holds a tensor."""
        return self._source.where(name)


def block_size(settings: Mapping[str, Any], path: Path) -> tuple[int, int]:
    """Returns the (rows, columns) of a block from the ``quantization_config`` of a checkpoint.

    Raises:
      JaxtuneError: another kind of fp8, or no such size.
    """
    where = f"{path / 'config.json'}: quantization_config"
    if (kind := settings.get("fmt", "e4m3")) != "e4m3":
        raise JaxtuneError(f"{where}.fmt={kind!r} is not supported (only 'e4m3')")
    block = settings.get("weight_block_size")
    if (
        not isinstance(block, list)
        or [type(size) for size in block] != [int, int]
        or min(block) < 1
    ):
        raise JaxtuneError(f"{where}.weight_block_size={block!r} is not two positive numbers")
    return block[0], block[1]


def deepseek_fp8_format(settings: Mapping[str, Any], path: Path) -> Float8:
    """Returns the format of a checkpoint from its ``quantization_config``.

    Raises:
      JaxtuneError: another kind of fp8, or no size of a block.
    """
    return Float8(block_size(settings, path))


def fp8_settings(form: Float8, plain: Sequence[str], dtype: str) -> dict[str, Any]:
    """Returns the ``quantization_config`` of a checkpoint in fp8; see `registry.FormatWriter`."""
    del dtype
    return {
        "quant_method": METHOD,
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(form.block),
        "modules_to_not_convert": list(plain),
    }


def fp8_tensors(
    module: str,
    form: Float8,
    shape: tuple[int, int],
    dtype: str,
    part: Callable[[str], np.ndarray],
) -> dict[str, Pending]:
    """Returns the tensors of a weight [out, in] in fp8; see `registry.FormatWriter`."""
    del dtype
    name, kind = f"{module}.weight", ml_dtypes.float8_e4m3fn
    blocks = form.parts(shape)["scale"].shape
    return {
        name: Pending(shape, kind, lambda: part("codes").view(kind)),
        name + SUFFIX: Pending(blocks, np.float32, lambda: part("scale")),
    }
