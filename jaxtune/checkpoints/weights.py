"""Finds the weight files of a directory and checks them against each other.

A directory may contain the same weights twice: a single file and an index of several, or PyTorch's
own files and safetensors. transformers and PEFT use the first form they find, so that an outdated
file may be read silently. Here, a single file is compared with an index, and the two forms of an
adapter with each other; if a model has both forms, the log names the one that is ignored.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxtune.checkpoints.finite import check_finite
from jaxtune.checkpoints.formats.safetensors import SafetensorsFile
from jaxtune.checkpoints.formats.torch_file import TorchFile
from jaxtune.checkpoints.source import TensorFile
from jaxtune.errors import JaxtuneError
from jaxtune.strict_json import MAX_INDEX_BYTES, read_object

_logger = logging.getLogger(__name__)
_COMPARED_BYTES = 2**24  # bytes compared at a time


class _Form(NamedTuple):
    """A form in which a model's weights may be stored.

    Attributes:
      whole: name of the file, if there is a single one.
      index: name of the index, if there are several files.
      ending: suffix of the files' names.
      open: function that opens a file.
    """

    whole: str
    index: str
    ending: str
    open: Callable[[Path], TensorFile]


# transformers' order.
FORMS = (
    _Form("model.safetensors", "model.safetensors.index.json", ".safetensors", SafetensorsFile),
    _Form("pytorch_model.bin", "pytorch_model.bin.index.json", ".bin", TorchFile),
)


def has_weights(directory: Path, form: int) -> bool:
    """Returns whether a directory has weights in the form `FORMS[form]`."""
    return any((directory / name).is_file() for name in FORMS[form][:2])


def open_weights(directory: Path) -> dict[str, TensorFile]:
    """Opens the weights of a model: safetensors if there are any, otherwise PyTorch's files.

    Returns:
      The file of each tensor, by name.

    Raises:
      JaxtuneError: a file is missing, damaged or named outside the directory, or two files
        disagree.
    """
    present = [form for number, form in enumerate(FORMS) if has_weights(directory, number)]
    if not present:
        whole = " nor ".join(form.whole for form in FORMS)
        indexes = " or ".join(form.index for form in FORMS)
        raise JaxtuneError(f"{directory}: holds neither {whole}, nor {indexes}")
    form, *others = present
    for other in others:
        _logger.info(
            "%s: reading the %s files, as transformers does, and ignoring the %s files",
            *(directory, form.ending, other.ending),
        )
    whole, index = directory / form.whole, directory / form.index
    if not whole.is_file():
        return _open_indexed(index, form)
    tensors = _open_all([whole], form)
    if index.is_file():
        _check_agreement(whole, tensors, index, form)
    return tensors


def _open_all(paths: Sequence[Path], form: _Form) -> dict[str, TensorFile]:
    tensors: dict[str, TensorFile] = {}
    for path in paths:
        file = form.open(path)
        for name in file.names():
            if name in tensors:
                raise JaxtuneError(
                    f'{path}: tensor "{name}" is also in another file ({tensors[name].path.name})'
                )
            tensors[name] = file
    return tensors


def _open_indexed(index: Path, form: _Form) -> dict[str, TensorFile]:
    weight_map = _weight_map(index, form)
    files = sorted(set(weight_map.values()))
    tensors = _open_all([index.parent / name for name in files], form)
    elsewhere = sorted(
        name
        for name, file in weight_map.items()
        if name not in tensors or tensors[name].path.name != file
    )
    if elsewhere:
        # transformers also trusts the files rather than the index; missing tensors fail later.
        _logger.warning(
            "%s: lists %s for %d tensor(s) that it does not hold, such as %s: ignoring the index "
            "for these",
            *(index, weight_map[elsewhere[0]], len(elsewhere), elsewhere[0]),
        )
    pattern = f"{form.whole.removesuffix(form.ending)}-*{form.ending}"
    unnamed = sorted({path.name for path in index.parent.glob(pattern)} - set(files))
    if unnamed:
        _logger.warning(
            "%s: does not list %s, so %s not read",
            *(index, ", ".join(unnamed), "they are" if len(unnamed) > 1 else "it is"),
        )
    return tensors


def _weight_map(index: Path, form: _Form) -> dict[str, str]:
    """Returns the file of each tensor that an index lists."""
    weight_map = read_object(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise JaxtuneError(f'{index}: has no "weight_map"')
    for name in map(str, weight_map.values()):
        # An index is untrusted: it may list weight files in its own directory only.
        if name != Path(name).name or not name.endswith(form.ending):
            raise JaxtuneError(f"{index}: the file name {name!r} is not allowed")
    return {name: str(file) for name, file in weight_map.items()}


def _check_agreement(
    whole: Path, tensors: Mapping[str, TensorFile], index: Path, form: _Form
) -> None:
    """Checks a single weight file against an index in the same directory.

    Raises:
      JaxtuneError: the index lists a missing file, or files with other weights.
    """
    both = f"{whole.parent}: holds {whole.name} and {index.name}"
    advice = "remove the one that is out of date"
    weight_map = _weight_map(index, form)
    files = sorted(set(weight_map.values()))
    missing = [name for name in files if not (whole.parent / name).is_file()]
    if missing:
        raise JaxtuneError(f"{both}, which lists the missing file {missing[0]}: {advice}")
    if files == [whole.name]:
        differs = sorted(set(weight_map) ^ set(tensors))
    else:
        _logger.info("%s: comparing them", both)
        differs = _differences(tensors, _open_indexed(index, form))
    if differs:
        raise JaxtuneError(f'{both}, which differ in "{_shown(differs[0])}": {advice}')


def _differences(one: Mapping[str, TensorFile], other: Mapping[str, TensorFile]) -> list[str]:
    """Returns tensors that are in only one of two places, or else the first that differs."""
    if set(one) != set(other):
        return sorted(set(one) ^ set(other))
    return next(([name] for name in one if not _same(name, one[name], other[name])), [])


def _same(name: str, one: TensorFile, other: TensorFile) -> bool:
    if one.shape(name) != other.shape(name) or one.dtype(name) != other.dtype(name):
        return False
    a, b = (file.read(name).reshape(-1).view(np.uint8) for file in (one, other))
    return all(
        np.array_equal(a[start : start + _COMPARED_BYTES], b[start : start + _COMPARED_BYTES])
        for start in range(0, len(a), _COMPARED_BYTES)
    )


def _shown(name: str) -> str:
    return name if name.isprintable() and len(name) < 400 else ascii(name[:100])


def read_weights(directory: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads all tensors, of any shape, of a small file, as views of its memory map.

    Args:
      directory: directory of the file.
      names: possible names of the file, the preferred one first: safetensors or PyTorch's.

    Raises:
      JaxtuneError: the file is missing or damaged, two files disagree, or a value is not finite.
    """
    paths = [directory / name for name in names if (directory / name).is_file()]
    if not paths:
        others = "".join(f", nor {name}" for name in names[1:])
        raise JaxtuneError(f"{directory / names[0]}: no such file{others}")
    first = open_file(paths[0])
    for path in paths[1:]:
        try:
            other = open_file(path)
        except JaxtuneError as error:
            raise JaxtuneError(
                f"{directory}: holds {first.path.name} and {path.name}, but the second cannot be "
                f"compared: remove the one that is out of date ({error})"
            ) from error
        one, two = (dict.fromkeys(file.names(), file) for file in (first, other))
        if differs := _differences(one, two):
            raise JaxtuneError(
                f"{directory}: holds {first.path.name} and {other.path.name}, which differ in "
                f'"{_shown(differs[0])}": remove the one that is out of date'
            )
    return {name: read_finite(first, name) for name in first.names()}


def read_finite(file: TensorFile, name: str) -> np.ndarray:
    """Returns a tensor of any shape, as a view of the file if possible.

    Raises:
      JaxtuneError: a value is NaN, infinite or beyond float32.
    """
    value = file.read(name)
    check_finite(value, _shown(name), str(file.path), np.float32)
    return value


def open_file(path: Path) -> TensorFile:
    """Opens a file of tensors; the suffix of its name selects the format.

    Raises:
      JaxtuneError: the file is missing or damaged.
    """
    return TorchFile(path) if path.suffix == ".bin" else SafetensorsFile(path)
