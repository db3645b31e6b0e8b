"""Names that a PyTorch state dict may refer to, and inert descriptions of the calls it makes.

Source: ``torch/_utils.py``, for the functions and their arguments.
"""

from __future__ import annotations

from typing import Any, NamedTuple

LENGTH = 32  # maximum number of dimensions of a tensor


class Refusal(Exception):
    """A pickle is rejected; the message continues "its pickle …"."""


# The supported dtypes of torch, by the storage class with such values.
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
      key: name of the member of the archive.
      dtype: name of the torch dtype; empty for an untyped storage.
      count: number of values; number of bytes for an untyped storage.
    """

    key: str
    dtype: str
    count: int


class TensorRecord(NamedTuple):
    """The description of a tensor in a state dict, not yet checked against the archive.

    Attributes:
      storage: storage that holds the values.
      dtype: name of the torch dtype.
      offset: index of the first value in the storage.
      shape: shape of the tensor.
      strides: stride of each dimension, in values.
    """

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Tag(NamedTuple):
    """The inert stand-in for a name in a state dict: a function, storage class or dtype."""

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
    """Stands for collections.OrderedDict: a plain dict to which a pickle may assign attributes."""

    __slots__ = ()


def describe_storage(identifier: Any) -> Storage:
    """Returns the storage that a persistent id refers to; its device is ignored.

    Raises:
      Refusal: the id does not refer to a storage.
    """
    match identifier:
        case ("storage", Tag("storage", dtype), str(key), str(), int(count)) if count >= 0:
            return Storage(key, dtype, count)
        case _:
            raise Refusal("has a persistent id that is not a storage's")


def describe_call(tag: Any, arguments: Any) -> TensorRecord | OrderedDict:
    """Returns the description of a call's result: a tensor, or an empty dict.

    Raises:
      Refusal: an unknown function, or unexpected arguments.
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
            raise Refusal("calls a function with unexpected arguments")


def _check_plain(hooks: dict[str, Any], rest: list[Any]) -> None:
    """Raises if a tensor has hooks, or a flag that changes its values."""
    if hooks or len(rest) > 1 or (rest and rest[0]):
        raise Refusal("gives a tensor hooks or flags (such as a pending conjugation)")


def _tensor(storage: Any, dtype: str, offset: Any, shape: Any, strides: Any) -> TensorRecord:
    if type(storage) is not Storage or bool(storage.dtype) == bool(dtype):
        raise Refusal("gives a tensor a storage of another kind")
    if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
        raise Refusal("gives a tensor a shape and strides that do not match")
    if len(shape) > LENGTH or not all(map(_natural, (offset, *shape, *strides))):
        raise Refusal("gives a tensor a size, stride or offset that is not a natural number")
    return TensorRecord(storage, dtype or storage.dtype, offset, shape, strides)


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
