"""What a PyTorch state dict may name, and what a call of it would give: descriptions, all inert.

Source: ``torch/_utils.py``, for the functions and their arguments.
"""

from __future__ import annotations

from typing import Any, NamedTuple

LENGTH = 32  # the most dimensions of a tensor


class Refusal(Exception):
    """What is wrong with a pickle; the message continues "its pickle"."""


# The dtypes of torch that are read, by the class of a storage with such values.
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
DTYPES = (*STORAGES.values(), "float8_e4m3fn", "float8_e5m2")


class Storage(NamedTuple):
    """The values of one or several tensors.

    Attributes:
      key: names the member of the archive.
      dtype: of torch, by name; empty where the storage has bytes.
      count: values; bytes where the storage has no dtype.
    """

    key: str
    dtype: str
    count: int


class TensorRecord(NamedTuple):
    """What a state dict says of a tensor; nothing in it has been checked against the archive.

    Attributes:
      storage: where its values are.
      dtype: of torch, by name.
      offset: of the first value, in values.
      shape: of the tensor.
      strides: in values, one for each dimension.
    """

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Tag(NamedTuple):
    """A name that a state dict may refer to: of a function, a storage class or a dtype."""

    kind: str
    value: str = ""


TAGS = {
    "collections.OrderedDict": Tag("dict"),
    "torch._utils._rebuild_tensor": Tag("tensor"),
    "torch._utils._rebuild_tensor_v2": Tag("tensor_v2"),
    "torch._utils._rebuild_tensor_v3": Tag("tensor_v3"),
    "torch._utils._rebuild_parameter": Tag("parameter"),
    "torch.storage.UntypedStorage": Tag("storage"),
    **{f"torch.{name}": Tag("storage", dtype) for name, dtype in STORAGES.items()},
    **{f"torch.{dtype}": Tag("dtype", dtype) for dtype in DTYPES},
}


class OrderedDict(dict[str, Any]):
    """What an OrderedDict is here: a plain dict that a pickler may give attributes."""

    __slots__ = ()


def describe_storage(identifier: Any) -> Storage:
    """Returns the storage that a persistent id stands for; its device is ignored.

    Raises:
      Refusal: the id of anything else.
    """
    match identifier:
        case ("storage", Tag("storage", dtype), str(key), str(), int(count)) if count >= 0:
            return Storage(key, dtype, count)
        case _:
            raise Refusal("has a persistent id that is not a storage's")


def describe_call(tag: Any, arguments: Any) -> TensorRecord | OrderedDict:
    """Returns what a call would give: a tensor, or an empty dict.

    Raises:
      Refusal: a call of anything else, or with other arguments.
    """
    if not isinstance(tag, Tag) or type(arguments) is not tuple:
        raise Refusal("calls something that is not a function")
    match (tag.kind, *arguments):
        case ("dict",):
            return OrderedDict()
        case ("tensor", storage, offset, shape, strides):
            return _tensor(storage, "", offset, shape, strides)
        case ("tensor_v2", storage, offset, shape, strides, _, dict() as hooks, *rest):
            _check_plain(hooks, rest)
            return _tensor(storage, "", offset, shape, strides)
        case ("tensor_v3", storage, offset, shape, strides, _, dict() as hooks, last, *rest):
            _check_plain(hooks, rest)
            if not isinstance(last, Tag) or last.kind != "dtype":
                raise Refusal("gives a tensor a dtype that is not one")
            return _tensor(storage, last.value, offset, shape, strides)
        case ("parameter", TensorRecord() as tensor, bool(), dict() as hooks):
            _check_plain(hooks, [])
            return tensor
        case _:
            raise Refusal("calls a function with arguments that it does not take")


def _check_plain(hooks: dict[str, Any], rest: list[Any]) -> None:
    """Refuses a tensor with hooks, or with a flag by which its values are others."""
    if hooks or len(rest) > 1 or (rest and rest[0]):
        raise Refusal("gives a tensor hooks or flags (such as a pending conjugation)")


def _tensor(storage: Any, dtype: str, offset: Any, shape: Any, strides: Any) -> TensorRecord:
    if type(storage) is not Storage or bool(storage.dtype) == bool(dtype):
        raise Refusal("gives a tensor a storage of another kind")
    if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
        raise Refusal("gives a tensor a shape and strides that do not fit one another")
    if len(shape) > LENGTH or not all(map(_natural, (offset, *shape, *strides))):
        raise Refusal("gives a tensor a size, stride or offset that is not a natural number")
    return TensorRecord(storage, dtype or storage.dtype, offset, shape, strides)


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
