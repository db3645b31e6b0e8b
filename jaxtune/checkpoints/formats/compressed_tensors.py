"""Checkpoints in int4 of the format "pack-quantized" of compressed-tensors: reading and writing.

A weight [out, in] with groups of `group_size` columns consists of

- ``weight_packed``: int32 [out, ⌈in / 8⌉], eight 4-bit codes in a word, the first in the lowest
  bits;
- ``weight_scale``: [out, groups];
- ``weight_shape``: int64 [2], (out, in);
- ``weight_zero_point``, if asymmetric: int32 [⌈out / 8⌉, groups], zero points packed along `out`.

Codes and zero points are stored as 0 … 15: w = scale · (code − 8), or scale · (code − zero).

Source: the compressed-tensors package, with which vLLM and transformers read such checkpoints.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxtune.checkpoints.formats.packed_source import (
    LARGEST_GROUP,
    PackedSource,
    Specified,
    pack_rows,
    unpack_rows,
)
from jaxtune.checkpoints.formats.safetensors import Pending
from jaxtune.checkpoints.source import TensorSource
from jaxtune.errors import JaxtuneError, shown
from jaxtune.quant.int4 import Int4, decode_values

METHOD = "compressed-tensors"
PER_WORD = 8  # codes in an int32
_ENDINGS = {
    "codes": ".weight_packed",
    "scale": ".weight_scale",
    "shape": ".weight_shape",
}
_ASYMMETRIC_ENDINGS = _ENDINGS | {"zero": ".weight_zero_point"}
_SCHEME: dict[str, tuple[Any, ...]] = {
    "num_bits": (4,),
    "type": ("int",),
    "strategy": ("group", "channel"),
    "symmetric": (True, False),
    "actorder": (None, "weight", "static"),  # the values that do not permute columns
}


def compressed_tensors_format(settings: Mapping[str, Any], path: Path) -> Int4:
    """Returns the format of a checkpoint from its ``quantization_config``.

    Raises:
      JaxtuneError: an unsupported format of compressed-tensors.
    """
    where = f"{path / 'config.json'}: quantization_config"
    if (kind := settings.get("format")) != "pack-quantized":
        raise JaxtuneError(f"{where}.format={shown(kind)} is not supported (only 'pack-quantized')")
    groups = settings.get("config_groups")
    schemes = [
        group.get("weights") if isinstance(group, Mapping) else None
        for group in (groups.values() if isinstance(groups, Mapping) else [])
    ]
    if len(schemes) != 1 or not isinstance(schemes[0], Mapping):
        raise JaxtuneError(f"{where}.config_groups is not one group with weights")
    scheme = schemes[0]
    for key, choices in _SCHEME.items():
        if scheme.get(key) not in choices:
            known = " or ".join(map(repr, choices))
            raise JaxtuneError(f"{where}: weights.{key}={shown(scheme.get(key))} is not {known}")
    if scheme["strategy"] == "channel":
        return Int4(0, scheme["symmetric"])
    size = scheme.get("group_size")
    if type(size) is not int or not 1 <= size <= LARGEST_GROUP:
        raise JaxtuneError(
            f"{where}: weights.group_size={shown(size)} is not a positive number up to "
            f"{LARGEST_GROUP}"
        )
    return Int4(size, scheme["symmetric"])


def _from_words(words: np.ndarray) -> np.ndarray:
    """Unpacks int32 [rows, words] to codes uint8 [rows, 8 · words].

    In a little-endian word the first code is the low half of the first byte, so bytes can be split
    in order: low half, high half.
    """
    raw = np.ascontiguousarray(words, "<i4").view(np.uint8)
    return np.stack([raw & 15, raw >> 4], axis=-1).reshape(words.shape[0], -1)


def _to_words(codes: np.ndarray) -> np.ndarray:
    """Packs codes uint8 [rows, columns] to int32 [rows, ⌈columns / 8⌉], padded with zeros."""
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % PER_WORD)))
    return np.ascontiguousarray(padded[:, ::2] | (padded[:, 1::2] << 4)).view("<i4")


class PackedInt4Source(PackedSource):
    """A checkpoint in int4."""

    def __init__(self, source: TensorSource):
        """Groups the tensors of each weight and checks them.

        Raises:
          JaxtuneError: an unsupported setting, or a tensor that is missing or inconsistent.
        """
        self._int4 = compressed_tensors_format(source.config["quantization_config"], source.path)
        endings = _ENDINGS if self._int4.symmetric else _ASYMMETRIC_ENDINGS
        super().__init__(source, self._int4, endings)

    def _check(self, weight: str) -> None:
        name = self._tensors[weight]["shape"]
        shape, dtype = self._source.shape(name), str(self._source.dtype(name))
        if shape != (2,) or dtype not in ("int64", "int32"):
            raise self._error(weight, "shape", f"is {dtype} {list(shape)}, not int64 [2]")
        if min(self._shape(weight)) < 1:
            problem = f"is {list(self._shape(weight))}, not two positive numbers"
            raise self._error(weight, "shape", problem)
        super()._check(weight)

    def _shape(self, weight: str) -> tuple[int, int]:
        rows, columns = self._stored(weight, "shape").tolist()
        return rows, columns

    def _specified(self, weight: str) -> dict[str, Specified]:
        rows, columns = self._shape(weight)
        groups = self._int4.parts((rows, columns))["scale"].shape[0]
        specified = {
            "codes": Specified((rows, -(-columns // PER_WORD)), ("int32",)),
            "scale": Specified((rows, groups), ("bfloat16", "float16", "float32")),
        }
        if not self._int4.symmetric:
            specified["zero"] = Specified((-(-rows // PER_WORD), groups), ("int32",))
        return specified

    def _codes(self, weight: str, first: int, last: int) -> np.ndarray:
        """Returns the codes of rows first … last − 1, uint8 [last − first, in]."""
        columns = self._shape(weight)[1]
        return _from_words(self._stored(weight, "codes")[first:last])[:, :columns]

    def _zeros(self, weight: str) -> np.ndarray:
        """Returns the zero points of an asymmetric weight, uint8 [groups, out]."""
        return _from_words(self._stored(weight, "zero").T)[:, : self._shape(weight)[0]]

    def _decode(self, weight: str, first: int, last: int) -> np.ndarray:
        columns = self._shape(weight)[1]
        size = self._int4.group_size or columns

        def per_value(groups: np.ndarray) -> np.ndarray:
            """Repeats [out, groups] to one entry per value; the last group may be shorter."""
            wide = np.repeat(groups[first:last].astype(np.float32), size, axis=1)
            return wide[:, :columns]

        codes, scale = self._codes(weight, first, last), per_value(self._stored(weight, "scale"))
        if self._int4.symmetric:
            return decode_values(codes, scale)
        return decode_values(codes, scale, per_value(self._zeros(weight).T))

    def _parts(self, weight: str) -> dict[str, np.ndarray] | None:
        scale = self._stored(weight, "scale")
        if scale.dtype != ml_dtypes.bfloat16:
            return None
        codes = functools.partial(self._codes, weight)
        parts = {"codes": pack_rows(codes, self._shape(weight)), "scale": scale.T}
        return parts if self._int4.symmetric else {**parts, "zero": self._zeros(weight)}


def int4_settings(form: Int4, plain: Sequence[str], dtype: str) -> dict[str, Any]:
    """Returns the ``quantization_config`` of a checkpoint in int4; see `registry.FormatWriter`."""
    del dtype
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": form.symmetric,
        "strategy": "group" if form.group_size else "channel",
        "group_size": form.group_size or None,
        "dynamic": False,
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
    return {
        "quant_method": METHOD,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(plain),
    }


def int4_tensors(
    module: str,
    form: Int4,
    shape: tuple[int, int],
    dtype: str,
    part: Callable[[str], np.ndarray],
) -> dict[str, Pending]:
    """Returns the tensors of a weight [out, in] in int4; see `registry.FormatWriter`."""
    del dtype
    rows, columns = shape
    words, groups = -(-columns // PER_WORD), form.parts(shape)["scale"].shape[0]

    def codes() -> np.ndarray:
        packed = np.empty((rows, words), np.int32)
        for first, chunk in unpack_rows(part("codes"), shape):
            packed[first : first + chunk.shape[0]] = _to_words(chunk)
        return packed

    tensors = {
        "codes": Pending((rows, words), np.int32, codes),
        "scale": Pending((rows, groups), ml_dtypes.bfloat16, lambda: part("scale").T),
        "shape": Pending((2,), np.int64, lambda: np.array(shape, np.int64)),
    }
    if not form.symmetric:
        zeros = (-(-rows // PER_WORD), groups)
        tensors["zero"] = Pending(zeros, np.int32, lambda: _to_words(part("zero")).T)
    return {module + _ASYMMETRIC_ENDINGS[key]: tensor for key, tensor in tensors.items()}
