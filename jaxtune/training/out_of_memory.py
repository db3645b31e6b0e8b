"""One-line errors for devices out of memory, with suggested changes of the config."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import jax

from jaxtune.config.length import divisors_of
from jaxtune.errors import JaxtuneError
from jaxtune.memory_errors import is_out_of_memory, read_shortage
from jaxtune.parallel.memory import GIB, device_bytes
from jaxtune.training.setup import Setup

# Values that a decoder layer saves for its backward pass, per token and hidden unit. Korthikanti et
# al., 2022, count 34 bytes at 16 bits, without attention scores.
_SAVED_PER_LAYER = 17
_NF4_SHARE = 0.53 / 2  # size of a weight in NF4 with its scales, relative to 16 bits


class Remedy(NamedTuple):
    """A change of the config and its estimated saving in bytes per device."""

    change: str
    bytes: float


@contextlib.contextmanager
def out_of_memory_named(setup: Setup) -> Iterator[None]:
    """Turns an out-of-memory error into one that suggests changes of the config.

    Args:
      setup: setup of the run in the block.

    Raises:
      JaxtuneError: a device is out of memory; other errors propagate unchanged.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise JaxtuneError(explain(str(error), setup)) from error


def explain(text: str, setup: Setup) -> str:
    """Returns one line: the memory needed, the memory available and suggested changes.

    Args:
      text: text of XLA's error.
      setup: setup of the run.
    """
    program, array, limit = read_shortage(text)
    needed = array if program is None else program
    # XLA reports either the size of a whole program with the limit, or one more allocation without.
    more = "" if limit is not None else " more"
    if limit is None:
        limit = device_bytes(setup.mesh.devices.flat[0])
    parts = ["out of memory"]
    if needed is not None:
        parts.append(f"{needed / GIB:.2f} GiB{more} were needed")
    if limit is not None:
        parts.append(f"a device has {limit / GIB:.2f} GiB")
    first, *others = remedies(setup)
    then = f"; then {', '.join(remedy.change for remedy in others)}" if others else ""
    return (
        f"{', '.join(parts)}; change first: {first.change}, which saves about "
        f"{first.bytes / GIB:.2g} GiB per device (an estimate; jaxtune plan has the compiler's "
        f"own figures){then}"
    )


def remedies(setup: Setup) -> list[Remedy]:
    """Returns changes that reduce memory, the least costly in speed and quality first.

    Savings are estimates per device. `values` is the size of one [rows, T, hidden] array; with
    remat, a layer saves that one input, otherwise about `_SAVED_PER_LAYER` such arrays.
    """
    training, model = setup.config.training, setup.definition.config
    split = setup.split
    length = setup.config.data.max_length // setup.mesh.shape["sequence"]
    values = split.rows_per_device * length * model["hidden_size"] * setup.options.dtype.itemsize
    saved = values * model["num_hidden_layers"]
    # With remat, the inputs of all layers are saved, and all activations of one layer at a time.
    kept = saved + values * _SAVED_PER_LAYER
    found = []
    if training.remat != "full":
        found.append(Remedy("training.remat=full", saved * _SAVED_PER_LAYER - kept))
    else:
        saved = kept
    for count in divisors_of(split.rows):
        smaller = split._replace(accumulation=count)
        if count > split.accumulation and smaller.rows_per_device < split.rows_per_device:
            share = 1 - smaller.rows_per_device / split.rows_per_device
            found.append(Remedy(f"training.accumulation={count}", saved * share))
            break
    if setup.quantization is None and setup.method.has_adapter:
        found.append(Remedy("quantize.format=nf4", _frozen_bytes(setup) * (1 - _NF4_SHARE)))
    found.append(Remedy(f"data.max_length={max(2, setup.config.data.max_length // 2)}", saved / 2))
    return found


def _frozen_bytes(setup: Setup) -> float:
    """Returns the bytes per device of the layers' frozen matrices, in their current dtype."""
    total = 0
    for leaf in jax.tree.leaves(setup.definition.abstract("base", setup.mesh)):
        if leaf.ndim > 2:  # stacked over layers
            shape = leaf.sharding.shard_shape(leaf.shape)
            total += jax.ShapeDtypeStruct(shape, leaf.dtype).size * leaf.dtype.itemsize
    return total
