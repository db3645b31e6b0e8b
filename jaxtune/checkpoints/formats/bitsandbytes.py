"""Checkpoints quantized by bitsandbytes, in NF4 or int8: reading and writing.

A weight W [out, in] in NF4 consists of

- ``W``: uint8 [⌈out · in / 2⌉, 1]; the codes of the flattened weight, two in a byte, the first in
  the high half (jaxtune's own layout is different, see `jaxtune.quant.codes`);
- ``W.absmax``: one scale per block of 64 successive values; float32, or uint8 codes with double
  quantization, which adds ``W.nested_absmax``, one float32 scale per 256 scales;
- ``W.quant_map`` and ``W.nested_quant_map``: the tables of code values;
- ``W.quant_state.bitsandbytes__nf4``: the bytes of a JSON object with shape, block sizes and the
  offset of double quantization.

A weight in int8 consists of int8 [out, in] and the largest magnitude of each row (``SCB``).

Source: the checkpoints that transformers writes with bitsandbytes.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.checkpoints.formats.packed_source import (
    PackedSource,
    Specified,
    pack_rows,
    unpack_rows,
)
from jaxtune.checkpoints.formats.safetensors import Pending
from jaxtune.checkpoints.source import TensorSource
from jaxtune.errors import JaxtuneError, shown
from jaxtune.quant import Format
from jaxtune.quant.int8 import Int8
from jaxtune.quant.nf4 import (
    BLOCK,
    DYNAMIC,
    NESTED_BLOCK,
    NF4,
    NormalFloat4,
    decode_scales,
    decode_values,
)
from jaxtune.strict_json import parse_json

LARGEST_OFFSET = 1e30  # of scales in float32
METHOD = "bitsandbytes"
_NF4_ENDINGS = {
    "codes": ".weight",
    "absmax": ".weight.absmax",
    "map": ".weight.quant_map",
    "state": ".weight.quant_state.bitsandbytes__nf4",
}
_DOUBLE_ENDINGS = _NF4_ENDINGS | {
    "nested_absmax": ".weight.nested_absmax",
    "nested_map": ".weight.nested_quant_map",
}
_INT8_ENDINGS = {"codes": ".weight", "absmax": ".SCB", "format": ".weight_format"}
_ZERO = 7  # the code of zero, which pads an odd number of codes to whole bytes
_SPARE = 24  # extra characters for the offset: more than the longest float needs beyond "0.0"


def bitsandbytes_format(settings: Mapping[str, Any], path: Path) -> Format:
    """Returns the format of a checkpoint from its ``quantization_config``.

    Raises:
      JaxtuneError: an unsupported format of bitsandbytes.
    """
    if settings.get("load_in_8bit"):
        return Int8()
    where = f"{path / 'config.json'}: quantization_config"
    if not settings.get("load_in_4bit"):
        raise JaxtuneError(f"{where} has neither load_in_4bit nor load_in_8bit")
    if (kind := settings.get("bnb_4bit_quant_type", "fp4")) != "nf4":
        raise JaxtuneError(
            f"{where}.bnb_4bit_quant_type={shown(kind)} is not supported (only 'nf4')"
        )
    return NormalFloat4(bool(settings.get("bnb_4bit_use_double_quant", False)))


def open_bitsandbytes(source: TensorSource) -> TensorSource:
    """Returns a checkpoint in NF4 or int8 as a source of float32 weights.

    Raises:
      JaxtuneError: an unsupported setting, or a tensor that is missing or inconsistent.
    """
    form = bitsandbytes_format(source.config["quantization_config"], source.path)
    return NF4Source(source, form) if isinstance(form, NormalFloat4) else Int8Source(source)


class NF4Source(PackedSource):
    """A checkpoint in NF4."""

    def __init__(self, source: TensorSource, form: NormalFloat4):
        """Groups the tensors of each weight and checks them.

        Raises:
          JaxtuneError: a tensor is missing or inconsistent with the format.
        """
        self._double = form.double
        self._states: dict[str, dict[str, Any]] = {}
        super().__init__(source, form, _DOUBLE_ENDINGS if form.double else _NF4_ENDINGS)

    def _check(self, weight: str) -> None:
        self._states[weight] = self._read_state(weight)
        super()._check(weight)
        codes = self._tensors[weight]["codes"]
        nbytes = math.prod(self._source.shape(codes)) * self._source.dtype(codes).itemsize
        wanted = -(-math.prod(self._shape(weight)) // 2)
        if nbytes != wanted:
            raise self._error(weight, "codes", f"holds {nbytes} bytes of codes, not {wanted}")
        for key, table in {"map": NF4, "nested_map": DYNAMIC}.items():
            if key not in self._tensors[weight]:
                continue
            stored = self._stored(weight, key)
            if not np.array_equal(stored, table):
                at = int(np.argmax(stored != table))
                found = f"has {stored[at]} at {at}, but this format has {table[at]}"
                raise self._error(weight, key, found)

    def _read_state(self, weight: str) -> dict[str, Any]:
        name = self._tensors[weight]["state"]
        place = f'{self._source.where(name)}: "{name}"'
        state = parse_json(self._stored(weight, "state").tobytes(), place, "tensor")
        if not isinstance(state, dict):
            raise self._error(weight, "state", "is not a JSON object")
        wanted = {"quant_type": "nf4", "blocksize": BLOCK}
        if self._double:
            wanted["nested_blocksize"] = NESTED_BLOCK
        for key, value in wanted.items():
            if state.get(key) != value:
                raise self._error(weight, "state", f"has {key}={state.get(key)!r}, not {value!r}")
        shape, offset = state.get("shape"), state.get("nested_offset")
        sizes = shape if isinstance(shape, list) else []
        if [type(size) for size in sizes] != [int, int] or min(sizes) < 1:
            raise self._error(weight, "state", f"has shape={shape!r}, not two positive numbers")
        if self._double and not (isinstance(offset, float) and abs(offset) < LARGEST_OFFSET):
            raise self._error(weight, "state", f"has nested_offset={offset!r}, not a number")
        return state

    def _shape(self, weight: str) -> tuple[int, int]:
        rows, columns = self._states[weight]["shape"]
        return rows, columns

    def _specified(self, weight: str) -> dict[str, Specified]:
        blocks = -(-math.prod(self._shape(weight)) // BLOCK)
        specified = {
            "absmax": Specified((blocks,), ("uint8" if self._double else "float32",)),
            "map": Specified(NF4.shape, ("float32",)),
        }
        if self._double:
            nested = (-(-blocks // NESTED_BLOCK),)
            specified["nested_absmax"] = Specified(nested, ("float32",))
            specified["nested_map"] = Specified(DYNAMIC.shape, ("float32",))
        return specified

    def _codes(self, weight: str, first: int, last: int) -> np.ndarray:
        """Returns the codes of rows first … last − 1, uint8 [last − first, in].

        Codes are packed over the flattened weight, so with an odd number of columns a row may
        begin in the middle of a byte; its first half is then cut off.
        """
        columns = self._shape(weight)[1]
        start, stop = first * columns, last * columns
        # The bytes may be stored under another dtype (bnb_4bit_quant_storage).
        raw = self._stored(weight, "codes").reshape(-1).view(np.uint8)
        pairs = raw[start // 2 : (stop + 1) // 2]
        codes = np.stack([pairs >> 4, pairs & 15], axis=-1).reshape(-1)
        return codes[start % 2 :][: stop - start].reshape(-1, columns)

    def _scales(self, weight: str, first: int, last: int) -> np.ndarray:
        """Returns the scales of blocks first … last − 1, float32 [last − first]."""
        absmax = self._stored(weight, "absmax")[first:last]
        if not self._double:
            return absmax
        nested = self._stored(weight, "nested_absmax")[np.arange(first, last) // NESTED_BLOCK]
        offset = np.float32(self._states[weight]["nested_offset"])
        return decode_scales(absmax, nested, offset)

    def _decode(self, weight: str, first: int, last: int) -> np.ndarray:
        columns = self._shape(weight)[1]
        start, stop = first * columns, last * columns
        # Blocks run over the flattened weight: the first one may begin before the first row.
        block = start // BLOCK
        scales = np.repeat(self._scales(weight, block, -(-stop // BLOCK)), BLOCK)
        scales = scales[start - block * BLOCK :][: stop - start]
        return decode_values(self._codes(weight, first, last), scales.reshape(-1, columns))

    def _parts(self, weight: str) -> dict[str, np.ndarray]:
        rows, columns = self._shape(weight)
        absmax = self._stored(weight, "absmax")
        parts = {
            "codes": pack_rows(functools.partial(self._codes, weight), (rows, columns)),
            "absmax": absmax.reshape(rows, -1).T if columns % BLOCK == 0 else absmax,
        }
        if self._double:
            parts["nested_absmax"] = self._stored(weight, "nested_absmax")
            parts["nested_offset"] = np.asarray(self._states[weight]["nested_offset"], np.float32)
        return parts


class Int8Source(PackedSource):
    """A checkpoint in int8."""

    def __init__(self, source: TensorSource):
        """Groups weights with the magnitudes of their rows.

        Raises:
          JaxtuneError: a tensor is missing or inconsistent with the format.
        """
        super().__init__(source, Int8(), _INT8_ENDINGS, optional=("format",))

    def _check(self, weight: str) -> None:
        shape = self._source.shape(self._tensors[weight]["codes"])
        if len(shape) != 2:
            raise self._error(weight, "codes", f"has shape {list(shape)}, not two dimensions")
        super()._check(weight)
        # Older versions could store weights in the tile layouts of GPU instructions.
        if "format" in self._tensors[weight] and (order := int(self._stored(weight, "format"))):
            raise self._error(weight, "format", f"is {order}; only 0, row by row, is supported")

    def _shape(self, weight: str) -> tuple[int, int]:
        rows, columns = self._source.shape(self._tensors[weight]["codes"])
        return rows, columns

    def _specified(self, weight: str) -> dict[str, Specified]:
        shape = self._shape(weight)
        specified = {
            "codes": Specified(shape, ("int8",)),
            "absmax": Specified(shape[:1], ("float32",)),
            "format": Specified((), ("uint8",)),
        }
        return {key: specified[key] for key in self._tensors[weight]}

    def _decode(self, weight: str, first: int, last: int) -> np.ndarray:
        parts = {key: part[first:last] for key, part in self._parts(weight).items()}
        return self.form.decode(parts, (last - first, self._shape(weight)[1]))

    def _parts(self, weight: str) -> dict[str, np.ndarray]:
        return {key: self._stored(weight, key) for key in ("codes", "absmax")}


def nf4_settings(form: NormalFloat4, plain: Sequence[str], dtype: str) -> dict[str, Any]:
    """Returns the ``quantization_config`` of a checkpoint in NF4; see `registry.FormatWriter`."""
    return {
        "quant_method": METHOD,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": form.double,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": dtype,
        "llm_int8_skip_modules": list(plain),
    }


def nf4_tensors(
    module: str,
    form: NormalFloat4,
    shape: tuple[int, int],
    dtype: str,
    part: Callable[[str], np.ndarray],
) -> dict[str, Pending]:
    """Returns the tensors of a weight [out, in] in NF4; see `registry.FormatWriter`."""
    size = -(-math.prod(shape) // 2)
    blocks = -(-math.prod(shape) // BLOCK)
    scale = np.uint8 if form.double else np.float32
    length = len(_state(shape, dtype, 0.0 if form.double else None)) + _SPARE

    def state() -> np.ndarray:
        offset = float(part("nested_offset")) if form.double else None
        # The header fixes a tensor's length before the offset is known; JSON ignores the spaces.
        return np.frombuffer(_state(shape, dtype, offset).ljust(length), np.uint8)

    tensors = {
        "codes": Pending((size, 1), np.uint8, lambda: _row_by_row(part("codes"), shape)),
        "absmax": Pending((blocks,), scale, lambda: part("absmax").T.reshape(-1)),
        "map": Pending(NF4.shape, np.float32, lambda: NF4),
        "state": Pending((length,), np.uint8, state),
    }
    if form.double:
        nested = (-(-blocks // NESTED_BLOCK),)
        tensors["nested_absmax"] = Pending(nested, np.float32, lambda: part("nested_absmax"))
        tensors["nested_map"] = Pending(DYNAMIC.shape, np.float32, lambda: DYNAMIC)
    return {module + _DOUBLE_ENDINGS[key]: tensor for key, tensor in tensors.items()}


def _state(shape: tuple[int, int], dtype: str, offset: float | None) -> bytes:
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": dtype, "shape": list(shape)}
    if offset is not None:
        nested = {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        state |= nested | {"nested_offset": offset}
    return json.dumps(state).encode()


def _row_by_row(packed: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Converts packed codes from jaxtune's layout to uint8 [⌈out · in / 2⌉, 1] of bitsandbytes.

    Chunks begin at even rows (see `row_chunks`), hence at whole bytes.
    """
    stored = np.empty((-(-math.prod(shape) // 2), 1), np.uint8)
    for first, codes in unpack_rows(packed, shape):
        flat = codes.reshape(-1)
        if flat.size % 2:
            flat = np.append(flat, np.uint8(_ZERO))
        start = first * shape[1] // 2
        stored[start : start + flat.size // 2, 0] = (flat[::2] << 4) | flat[1::2]
    return stored


def int8_settings(form: Int8, plain: Sequence[str], dtype: str) -> dict[str, Any]:
    """Returns the ``quantization_config`` of a checkpoint in int8; see `registry.FormatWriter`."""
    del form, dtype
    return {
        "quant_method": METHOD,
        "load_in_4bit": False,
        "load_in_8bit": True,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_threshold": 6.0,  # default threshold of activations multiplied in 16 bits
        "llm_int8_skip_modules": list(plain),
    }


def int8_tensors(
    module: str,
    form: Int8,
    shape: tuple[int, int],
    dtype: str,
    part: Callable[[str], np.ndarray],
) -> dict[str, Pending]:
    """Returns the tensors of a weight [out, in] in int8; see `registry.FormatWriter`."""
    del form, dtype
    tensors = {
        "codes": Pending(shape, np.int8, lambda: part("codes")),
        "absmax": Pending(shape[:1], np.float32, lambda: part("absmax")),
        "format": Pending((), np.uint8, lambda: np.zeros((), np.uint8)),
    }
    return {module + _INT8_ENDINGS[key]: tensor for key, tensor in tensors.items()}
