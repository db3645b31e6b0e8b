"""DeepSeek's block-scaled fp8 checkpoints: reading and writing.

A weight W [out, in] of type float8_e4m3fn comes with ``W_scale_inv``, float32
[⌈out / 128⌉, ⌈in / 128⌉]: one scale for each block of 128 rows and 128 columns; blocks at the edges
may be smaller. The value is ``float32(W) × scale``: despite its name the scale is a factor.

Source: the inference code of DeepSeek-V3 and its config.json (``weight_block_size``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxtune.checkpoints.formats.packed_source import LARGEST_GROUP, PackedSource, Specified
from jaxtune.checkpoints.formats.safetensors import Pending
from jaxtune.checkpoints.source import TensorSource
from jaxtune.errors import JaxtuneError, shown
from jaxtune.quant.fp8 import Float8

METHOD = "fp8"
_ENDINGS = {"codes": ".weight", "scale": ".weight_scale_inv"}


class Float8Source(PackedSource):
    """A checkpoint in block-scaled fp8."""

    def __init__(self, source: TensorSource):
        """Groups weights with their scales and checks them.

        Raises:
          JaxtuneError: an unsupported setting, or a scale that is missing or has the wrong shape.
        """
        form = deepseek_fp8_format(source.config["quantization_config"], source.path)
        self._block = form.block
        super().__init__(source, form, _ENDINGS)
        for name in self.names():
            if self.dtype(name) == ml_dtypes.float8_e4m3fn:
                raise JaxtuneError(
                    f'{self.where(name)}: "{name}" is fp8 but has no "{name}_scale_inv"'
                )

    def _check(self, weight: str) -> None:
        shape = self._source.shape(weight)
        if len(shape) != 2:
            raise self._error(weight, "codes", f"has shape {list(shape)}, not two dimensions")
        super()._check(weight)

    def _shape(self, weight: str) -> tuple[int, int]:
        rows, columns = self._source.shape(weight)
        return rows, columns

    def _specified(self, weight: str) -> dict[str, Specified]:
        shape = self._shape(weight)
        return {
            "codes": Specified(shape, ("float8_e4m3fn",)),
            "scale": Specified(self.form.parts(shape)["scale"].shape, ("float32",)),
        }

    @property
    def _row_multiple(self) -> int:
        return self._block[0]

    def _decode(self, weight: str, first: int, last: int) -> np.ndarray:
        # The rows of a block share their scales, so decoding starts at the first row of a block.
        block, parts = first // self._block[0], self._parts(weight)
        start = block * self._block[0]
        parts = {"codes": parts["codes"][start:last], "scale": parts["scale"][block:]}
        shape = last - start, self._shape(weight)[1]
        return self.form.decode(parts, shape)[first - start :]

    def _parts(self, weight: str) -> dict[str, np.ndarray]:
        codes = self._stored(weight, "codes").view(np.uint8)
        return {"codes": codes, "scale": self._stored(weight, "scale")}


def deepseek_fp8_format(settings: Mapping[str, Any], path: Path) -> Float8:
    """Returns the format of a checkpoint from its ``quantization_config``.

    Raises:
      JaxtuneError: an unsupported kind of fp8, or an invalid block size.
    """
    where = f"{path / 'config.json'}: quantization_config"
    if (kind := settings.get("fmt", "e4m3")) != "e4m3":
        raise JaxtuneError(f"{where}.fmt={shown(kind)} is not supported (only 'e4m3')")
    block = settings.get("weight_block_size")
    if (
        not isinstance(block, list)
        or [type(size) for size in block] != [int, int]
        or not 1 <= min(block) <= max(block) <= LARGEST_GROUP
    ):
        raise JaxtuneError(
            f"{where}.weight_block_size={shown(block)} is not two positive numbers up to "
            f"{LARGEST_GROUP}"
        )
    return Float8((block[0], block[1]))


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
        f"{module}.weight_scale_inv": Pending(blocks, np.float32, lambda: part("scale")),
    }
