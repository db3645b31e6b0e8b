"""Merging: folds the adapter's edit into the weights of the base.

A merged array is a function of the frozen arrays of one layer (and expert) and of that layer's
entries of the adapter. The frozen arrays may be those of a model in memory or come from a
checkpoint, one at a time: the arithmetic, and thus every bit of the result, is the same. It runs on
the host, a few rows at a time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxtune.adapters.method import Method
from jaxtune.adapters.targets import module_names
from jaxtune.errors import JaxtuneError
from jaxtune.layers.decoder import CausalLM
from jaxtune.layers.linear import Edit, edited_weight
from jaxtune.layers.tree import Path, Shared, declaration_of, layer_names
from jaxtune.parallel.host import host_device, read_part
from jaxtune.quant import is_quantized

CHUNK = 2**20  # values of a weight that are merged at a time: 4 MiB in float32


@dataclasses.dataclass(frozen=True)
class Frozen:
    """The frozen arrays of one layer (and expert), in host memory.

    Attributes:
      weight: [out, in], a NumPy array or a `QuantizedWeight` of such arrays.
      bias: NumPy array [out]; None without a bias.
    """

    weight: Any
    bias: np.ndarray | None = None

    @functools.cached_property
    def values(self) -> np.ndarray:
        """The weight [out, in]: float32 if it is quantized, else in its own dtype."""
        return decoded(self.weight, jnp.float32)


# Returns some rows of a merged array, in a dtype: [rows, in] of a weight, [rows] of a bias.
MergedRows = Callable[[slice, DTypeLike], np.ndarray]
# Prepares the merge of one array for its frozen values.
WeightEdit = Callable[[Frozen], MergedRows]


def merged_array(merged: MergedRows, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Returns a whole merged array, which is rounded once to `dtype`.

    Args:
      merged: result of a `WeightEdit`.
      shape: shape of the array, [out, in] or [out].
      dtype: dtype of the result.
    """
    whole = np.empty(shape, jnp.dtype(dtype))
    for rows in row_chunks(shape):
        whole[rows] = merged(rows, dtype)
    return whole


def row_chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Yields the rows of an array of this shape in ranges of at most `CHUNK` values."""
    count, columns = shape[0], int(np.prod(shape[1:]))
    step = max(CHUNK // max(columns, 1), 1)
    for first in range(0, count, step):
        yield slice(first, min(first + step, count))


def decoded(weight: Any, dtype: DTypeLike) -> np.ndarray:
    """Returns a plain or quantized weight [out, in] in host memory, computed on the host.

    A plain weight keeps its own dtype.
    """
    if not is_quantized(weight):
        return weight
    with jax.default_device(host_device()):
        return np.asarray(_decode(weight, jnp.dtype(dtype)))


@functools.partial(jax.jit, static_argnames="dtype")
def _decode(weight: Any, dtype: Any) -> jax.Array:
    return weight.dequantize(dtype)


@functools.partial(jax.jit, static_argnames="graphdef")
def _edit(weight: Any, bias: Any, states: Any, graphdef: Any) -> Edit:
    adapter = nnx.merge(graphdef, *states)
    for name, value in adapter.derived(weight).items():
        getattr(adapter, name).set_value(value)
    return adapter.edit(weight, bias, jnp.float32)


@functools.partial(jax.jit, static_argnames="dtype")
def _edited(weight: jax.Array, edit: Edit, dtype: Any) -> jax.Array:
    # One function from the stored rows to the result in `dtype`: the float32 rows in between stay
    # inside the program instead of being allocated as an output.
    return edited_weight(weight, edit, dtype)


def _rows_of(edit: Edit, rows: slice) -> Edit:
    """Returns the edit of some rows of a weight."""
    term, out_scale = edit.low_rank, edit.out_scale
    if term is not None:
        scale = term.scale[rows] if term.scale.ndim else term.scale
        term = term._replace(lora_B=term.lora_B[rows], scale=scale)
    return Edit(term, None if out_scale is None else out_scale[rows], edit.in_scale)


def _adapter_edit(adapter: Any, which: str, place: tuple[Any, ...], frozen: Frozen) -> MergedRows:
    """Prepares the edit of the weight or bias of a projection; `adapter` is split by nnx."""
    graphdef, shared, own = adapter
    states = jax.tree.map(read_part, shared), jax.tree.map(lambda v: read_part(v, place), own)
    with jax.default_device(host_device()):
        edit = jax.tree.map(np.asarray, _edit(frozen.weight, frozen.bias, states, graphdef))
    if which == "bias":
        return lambda rows, dtype: edit.bias[rows].astype(dtype)
    weight = frozen.values

    def merged(rows: slice, dtype: DTypeLike) -> np.ndarray:
        with jax.default_device(host_device()):
            return np.asarray(_edited(weight[rows], _rows_of(edit, rows), jnp.dtype(dtype)))

    return merged


def replacement(value: Callable[[], np.ndarray]) -> WeightEdit:
    """Returns the edit that puts another weight [out, in] in place of the frozen one."""

    def prepare(frozen: Frozen) -> MergedRows:
        del frozen
        whole = value()
        return lambda rows, dtype: whole[rows].astype(dtype)

    return prepare


def _rows_edit(token_rows: Any, frozen: Frozen) -> MergedRows:
    """Prepares the replacement of the rows of trained tokens."""
    ids, values = np.asarray(token_rows.ids), read_part(token_rows.rows().values)
    weight = frozen.values

    def merged(rows: slice, dtype: DTypeLike) -> np.ndarray:
        first, last, _ = rows.indices(len(weight))
        part, inside = weight[rows].astype(dtype), (ids >= first) & (ids < last)
        part[ids[inside] - first] = values[inside].astype(dtype)
        return part

    return merged


def check_merges(method: Method) -> None:
    """Checks that the edits of a method can be merged into the weights.

    Raises:
      JaxtuneError: the method does not edit weights.
    """
    if not method.can_merge:
        raise JaxtuneError(
            f"an adapter of adapter.method={method.name} cannot be merged: it does not edit "
            "weights; keep it apart from the base: jaxtune export --format peft writes "
            f"{method.files}"
        )


def edits(model: CausalLM) -> dict[str, WeightEdit]:
    """Returns the edit of every edited weight and bias of a model, by Hugging Face name.

    Layers and experts that the method leaves alone are not among them.

    Args:
      model: a bound model; the arrays of the base may be abstract.

    Raises:
      JaxtuneError: an edit adds a bias to a projection without one in this architecture.
    """
    # Trained rows of embedding and head replace rows; ESFT replaces whole experts; adapters edit.
    found: dict[str, WeightEdit] = {}
    embedding = model.decoder.embed_tokens
    if embedding.adapter is not None:
        found["model.embed_tokens.weight"] = functools.partial(_rows_edit, embedding.adapter)
    if model.lm_head is not None and model.lm_head_rows is not None:
        found["lm_head.weight"] = functools.partial(_rows_edit, model.lm_head_rows)
    for path, linear in model.projections().items():
        if linear.chosen is not None:
            found |= _chosen_edits(path, linear)
        if linear.adapter is not None:
            found |= _adapter_edits(path, linear)
    return found


def _chosen_edits(path: Path, linear: Any) -> dict[str, WeightEdit]:
    """Returns the replacements of whole experts by name."""
    declared, chosen = declaration_of(linear.weight), linear.chosen
    names = np.reshape(layer_names((*path, "weight"), declared), declared.stack_shape)
    stacked = chosen.weight.get_value()
    return {
        str(names[layer, expert]): replacement(functools.partial(read_part, stacked, (layer, slot)))
        for layer, experts in enumerate(chosen.experts)
        for slot, expert in enumerate(experts)
    }


def _adapter_edits(path: Path, linear: Any) -> dict[str, WeightEdit]:
    """Returns the edits of a projection's weights, and of its biases where there are any."""
    adapter, stack = linear.adapter, declaration_of(linear.weight).stack_shape
    arrays = ["weight", "bias"] if adapter.edits_bias(linear) else ["weight"]
    names = module_names(path, linear)
    if "bias" in arrays and linear.frozen[1] is None:
        raise JaxtuneError(
            f"{names[0]} has no bias in a "
            "model of this architecture, and the adapter adds one: it cannot be merged; keep "
            "it apart from the base: jaxtune export --format peft"
        )
    split = nnx.split(adapter, Shared, ...)
    return {
        f"{name}.{which}": functools.partial(
            _adapter_edit, split, which, np.unravel_index(part, stack)
        )
        for part, (name, setting) in enumerate(zip(names, adapter.settings, strict=True))
        for which in arrays
        if setting is not None
    }
