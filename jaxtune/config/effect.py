"""Options that take no effect with the chosen method, weight format, optimizer or schedule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from jaxtune.config.option import OptionValue
from jaxtune.config.tree import OPTIONS
from jaxtune.registry import SELECTORS, Entry


class Unused(NamedTuple):
    """An option without effect.

    Attributes:
      key: ``section.name`` of the option.
      selector: key of the option whose value makes it ineffective, such as ``adapter.method``.
      choice: that value; empty if the selector is not set.
      readers: choices that read the option.
      read: options that the current choice reads.
    """

    key: str
    selector: str
    choice: str
    readers: tuple[str, ...]
    read: tuple[str, ...]

    def error(self, value: OptionValue) -> str:
        """Returns the error message for the option set to `value` on the command line."""
        where = f"with {self.selector}={self.choice}" if self.choice else f"without {self.selector}"
        message = f"{self.key}={text(value)} has no effect {where}: {', '.join(self.readers)} read"
        message += "s it" if len(self.readers) == 1 else " it"
        if not self.choice:
            return message
        own = [key.removeprefix(f"{self.key.partition('.')[0]}.") for key in self.read]
        return f"{message}; {self.choice} reads {', '.join(own) or 'no options of its own'}"


def unused_options(values: Mapping[str, OptionValue]) -> Iterator[Unused]:
    """Yields the options that take no effect, regardless of their value.

    An option belongs to a selector if one of the selector's choices lists it, and takes effect if
    the current choice does. Options that no choice lists always take effect.

    Args:
      values: all options of a config by ``section.name``.
    """
    for selector, choices in SELECTORS.items():
        read = {name: _keys(selector, entry) for name, entry in choices.items()}
        chosen = str(values[selector])
        current = read.get(chosen, ())
        for key in OPTIONS:
            readers = tuple(name for name, keys in read.items() if key in keys)
            if readers and key not in current:
                yield Unused(key, selector, chosen, readers, current)


def readers_of(key: str) -> dict[str, tuple[str, ...]]:
    """Returns the choices that read an option, by selector; empty if it always takes effect."""
    found: dict[str, tuple[str, ...]] = {}
    for selector, choices in SELECTORS.items():
        readers = tuple(name for name, entry in choices.items() if key in _keys(selector, entry))
        if readers:
            found[selector] = readers
    return found


def text(value: OptionValue) -> str:
    """Returns a value in the syntax of the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _keys(selector: str, entry: Entry) -> tuple[str, ...]:
    """Returns the options that a choice reads, as ``section.name``."""
    section = selector.partition(".")[0]
    return tuple(name if "." in name else f"{section}.{name}" for name in entry.options)
