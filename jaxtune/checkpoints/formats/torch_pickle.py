"""The pickle of a PyTorch state dict, interpreted without Python's unpickler.

A pickle is a program for a small stack machine, and Python's own machine imports and calls whatever
the program names. This one cannot call anything: names become inert tags, and calling a tag builds
the description of a tensor. Opcodes that state dicts do not need are rejected by name, before their
argument is read. The numbers of steps and bytes are bounded, so that a small file cannot describe a
large structure.

The machine has a stack of values, a stack of marks (positions in it, which delimit the items of
tuples and dicts) and a memo of numbered values. A tensor is, in essence: push the tag of
``_rebuild_tensor_v2``, push its arguments, pack them into a tuple, REDUCE.

Source: the descriptions of the opcodes in the standard library's `pickletools`.
"""

from __future__ import annotations

import mmap
import pickletools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxtune.checkpoints.formats.torch_names import (
    LENGTH,
    TAGS,
    OrderedDict,
    Refusal,
    TensorRecord,
    describe_call,
    describe_storage,
)
from jaxtune.errors import JaxtuneError

# Limits. For comparison, an adapter with 100,000 tensors takes 2.8 million steps and 120 MB.
TENSORS = 2**17
STEPS = 2**22
MEMORY = 160 * 2**20  # bytes of described values
ARGUMENT = 2**16  # bytes of one opcode's argument; the longest are names
STACK = 2**14  # values; picklers fill a dict in batches of 1000 items
MARKS = 32  # depth of nesting
MALFORMED = "is malformed"

ANOTHER_WAY = (
    "if you trust its source, read it with torch.load(..., weights_only=True) and write its plain "
    "tensors with safetensors.torch.save_file"
)


def printable(text: str) -> str:
    """Returns a name from a file, escaped and cut if necessary, for a one-line message."""
    return text if text.isprintable() and len(text) < 200 else ascii(text[:100])


class _Bytes:
    """The bytes of the pickle, with the file interface that `pickletools` needs."""

    def __init__(self, data: mmap.mmap, start: int, size: int):
        self._data, self._at, self._end = data, start, start + size

    def read(self, count: int) -> bytes:
        """Returns the next bytes."""
        start = self._at
        self._at = stop = start + count
        if count > ARGUMENT or stop > self._end:
            raise Refusal("is truncated, or contains a wrong length")
        return self._data[start:stop]

    def readline(self) -> bytes:
        """Returns the next line."""
        stop = self._data.find(b"\n", self._at, min(self._end, self._at + ARGUMENT))
        return self.read((stop if stop >= 0 else self._end) + 1 - self._at)

    def read_name(self) -> str:
        """Returns the dotted name from the next two lines, a module and an attribute."""
        return ".".join(self.readline()[:-1].decode("ascii") for _ in range(2))


class _Machine:
    """The stack, the memo, and the action of each opcode on them."""

    def __init__(self):
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: list[Any] = []
        self._memory = MEMORY
        self._does: dict[str, Callable[[Any], None]] = {
            "PROTO": self._ignore,
            "FRAME": self._ignore,
            "NONE": lambda _: self._push(None, 0),
            "NEWTRUE": lambda _: self._push(True, 0),
            "NEWFALSE": lambda _: self._push(False, 0),
            "EMPTY_TUPLE": lambda _: self._push((), 0),
            "EMPTY_DICT": lambda _: self._push({}, 64),
            **dict.fromkeys(("BININT", "BININT1", "BININT2", "BINFLOAT"), self._number),
            "LONG1": self._number,
            **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), self._text),
            "MARK": self._mark,
            "TUPLE": lambda _: self._push_tuple(self._from_mark()),
            "TUPLE1": lambda _: self._push_tuple(self._pop(1)),
            "TUPLE2": lambda _: self._push_tuple(self._pop(2)),
            "TUPLE3": lambda _: self._push_tuple(self._pop(3)),
            "SETITEM": lambda _: self._set_items(self._pop(2)),
            "SETITEMS": lambda _: self._set_items(self._from_mark()),
            **dict.fromkeys(("BINPUT", "LONG_BINPUT"), self._put),
            "MEMOIZE": lambda _: self._put(len(self._memo)),
            **dict.fromkeys(("BINGET", "LONG_BINGET"), self._get),
            "STACK_GLOBAL": self._stack_global,
            "BINPERSID": self._storage,
            "REDUCE": self._reduce,
            "BUILD": self._build,
        }

    def run(self, source: _Bytes) -> Any:
        """Runs the program and returns the value it leaves on the stack."""
        # (action, reader of the argument) by opcode.
        steps: dict[bytes, tuple[Callable[[Any], None], Any]] = {
            info.code.encode("latin-1"): (does, info.arg.reader if info.arg else None)
            for info in pickletools.opcodes
            if (does := self._does.get(info.name))
        }
        # The reader of `pickletools` would interpret backslashes in names, with warnings.
        steps[b"c"] = self._push_tag, _Bytes.read_name
        for _ in range(STEPS):
            code = source.read(1)
            if code in steps:
                does, reader = steps[code]
                does(None if reader is None else reader(source))
            elif code == b".":
                if len(self._stack) != 1 or self._marks:
                    raise Refusal(MALFORMED)
                return self._stack[0]
            else:
                known = {info.code: info.name for info in pickletools.opcodes}
                name = known.get(code.decode("latin-1"), repr(code))
                raise Refusal(f"uses {name}, which no state dict needs")
        raise Refusal(f"takes more than {STEPS} steps")

    def _push(self, value: Any, size: int) -> None:
        """Pushes a value and adds its size in bytes to the memory in use."""
        self._spend(size)
        if len(self._stack) >= STACK:
            raise Refusal("stacks more values than any state dict needs")
        self._stack.append(value)

    def _spend(self, size: int) -> None:
        self._memory -= size
        if self._memory < 0:
            raise Refusal(f"describes more than {MEMORY // 2**20} MB of structure")

    def _pop(self, count: int) -> list[Any]:
        """Pops the topmost `count` values, none of which may be below the last mark."""
        at = len(self._stack) - count
        if at < (self._marks[-1] if self._marks else 0):
            raise Refusal(MALFORMED)
        values = self._stack[at:]
        del self._stack[at:]
        return values

    def _top(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise Refusal(MALFORMED)
        return self._stack[-1]

    def _ignore(self, argument: Any) -> None:
        del argument

    def _number(self, value: float) -> None:
        self._push(value, 32)

    def _text(self, value: str) -> None:
        self._push(value, sys.getsizeof(value))

    def _mark(self, _: Any) -> None:
        if len(self._marks) >= MARKS:
            raise Refusal("nests more deeply than any state dict")
        self._marks.append(len(self._stack))

    def _from_mark(self) -> list[Any]:
        """Pops the last mark and the values above it, and returns the values."""
        if not self._marks:
            raise Refusal(MALFORMED)
        at = self._marks.pop()
        values = self._stack[at:]
        del self._stack[at:]
        return values

    def _push_tuple(self, values: list[Any]) -> None:
        """Pushes a tuple, which may contain tuples but no deeper nesting."""
        if len(values) > LENGTH:
            raise Refusal("has a longer tuple than any state dict needs")
        for value in values:
            if type(value) is tuple and tuple in map(type, value):
                raise Refusal("nests more deeply than any state dict")
        self._push(tuple(values), 48 + 8 * len(values))

    def _set_items(self, values: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, dict) or len(values) % 2:
            raise Refusal(MALFORMED)
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) is not str:  # nothing else is hashed: a nested tuple may be deep
                raise Refusal(f"has a key that is a {type(key).__name__}, not a string")
            if key in target:
                raise Refusal(f"has the key {printable(key)} twice")
            target[key] = value
        self._spend(80 * len(values))

    def _put(self, index: int) -> None:
        if index != len(self._memo):
            raise Refusal(f"fills its memo out of order, at {index}")
        self._spend(16)
        self._memo.append(self._top())

    def _get(self, index: int) -> None:
        if index >= len(self._memo):
            raise Refusal(MALFORMED)
        self._push(self._memo[index], 0)

    def _push_tag(self, name: str) -> None:
        if name not in TAGS:
            raise Refusal(f"names {printable(name)}, which no state dict of plain tensors needs")
        self._push(TAGS[name], 0)

    def _stack_global(self, _: Any) -> None:
        module, name = self._pop(2)
        if type(module) is not str or type(name) is not str:
            raise Refusal(MALFORMED)
        self._push_tag(f"{module}.{name}")

    def _storage(self, _: Any) -> None:
        (identifier,) = self._pop(1)
        self._push(describe_storage(identifier), 72)

    def _reduce(self, _: Any) -> None:
        self._push(describe_call(*self._pop(2)), 104)

    def _build(self, _: Any) -> None:
        """Discards the attributes of an OrderedDict, which hold the versions of modules."""
        self._pop(1)
        if type(self._top()) is not OrderedDict:
            raise Refusal("gives attributes to something other than an OrderedDict")


def read_state_dict(data: mmap.mmap, start: int, size: int, path: Path) -> dict[str, TensorRecord]:
    """Returns the tensors that the pickle of a state dict describes, by name.

    Args:
      data: the mapped file.
      start: offset of the pickle in bytes.
      size: size of the pickle in bytes.
      path: path of the file, for messages.

    Raises:
      JaxtuneError: the pickle is not a flat state dict of plain tensors.
    """
    try:
        value = _Machine().run(_Bytes(data, start, size))
    except Refusal as error:
        raise JaxtuneError(
            f"{path}: its pickle {error}; nothing in it was executed: {ANOTHER_WAY}"
        ) from None
    except ValueError as error:  # of `pickletools`
        reason = printable(str(error))
        raise JaxtuneError(f"{path}: its pickle {MALFORMED}: {reason}") from None
    if not isinstance(value, dict):
        raise JaxtuneError(f"{path}: is not a state dict, a dict of tensors by name")
    if len(value) > TENSORS:
        raise JaxtuneError(f"{path}: has {len(value)} tensors, more than the limit of {TENSORS}")
    for name, tensor in value.items():
        if not name.isprintable():
            raise JaxtuneError(f"{path}: the tensor name {printable(name)} is not allowed")
        if isinstance(tensor, dict):
            keys = f"torch.load({path.name!r}, weights_only=True)[{printable(name)!r}]"
            raise JaxtuneError(
                f'{path}: "{printable(name)}" is a nested dict, not a tensor: save that dict '
                f"alone, torch.save({keys}, {path.name!r})"
            )
        if type(tensor) is not TensorRecord:
            raise JaxtuneError(
                f'{path}: "{printable(name)}" is not a tensor but of type '
                f"{type(tensor).__name__}: save the state dict alone"
            )
    return value
