"""A run's config: the knobs of `jaxtune.knobs` in one tree, checked and frozen.

A config file is Python with a ``get_config()`` that starts from `default` and changes what it
wants; the command line overrides single keys (``--config.adapter.rank=8``). `resolve` checks the
whole tree and freezes it; the frozen tree is what the run directory stores.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import ml_collections

from jaxtune.errors import JaxtuneError, closest
from jaxtune.intervals import parse_interval
from jaxtune.knobs import KNOBS, Knob, knobs

# What `resolve` gives: an ml_collections.FrozenConfigDict, whose own types do not know that a
# section has attributes.
Config: TypeAlias = Any

_LENGTHS = {name: KNOBS["training"][name].default for name in ("steps", "epochs", "tokens")}


def default() -> ml_collections.ConfigDict:
    """Returns the documented default tree, locked: setting a key that does not exist raises."""
    tree = {s: {n: knob.default for n, knob in entries.items()} for s, entries in KNOBS.items()}
    config = ml_collections.ConfigDict(tree, type_safe=False)
    config.lock()
    return config


def _knob(key: str) -> Knob:
    table = dict(knobs())
    if key not in table:
        raise JaxtuneError(f'unknown config key "{key}"{closest(key, table)}')
    return table[key]


def _check(key: str, value: Any) -> Any:
    """Returns `value` in the type of its knob, or raises an error that names the key."""
    knob = _knob(key)
    wanted = type(knob.default)
    if knob.names:
        names = value.split(",") if isinstance(value, str) and "(" not in value else value
        names = (names,) if isinstance(names, str) else tuple(names)
        if value == "" and not knob.default:
            return ()
        # Numbers are names too: the updates of a profile, written (10, 20) in a config file.
        names = tuple(str(n) if type(n) is int else n for n in names)
        if (knob.default and not names) or not all(isinstance(n, str) and n.strip() for n in names):
            raise JaxtuneError(f"{key} takes one or more names, not {value!r}")
        return tuple(n.strip() for n in names)
    if knob.json:
        return _json_text(key, value)
    if knob.interval:
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise JaxtuneError(f"{key} takes a number of updates or an interval, not {value!r}")
        parse_interval(key, value)
        return int(value) if str(value).strip().isdecimal() else value
    if knob.share and isinstance(value, float):
        if not 0 <= value < 1:
            raise JaxtuneError(f"{key} takes a whole number, or a share below 1, not {value!r}")
        return value
    if knob.share and isinstance(value, int) and not isinstance(value, bool):
        wanted = int
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not wanted:
        raise JaxtuneError(f"{key} takes {wanted.__name__}, not {value!r}")
    if knob.choices and value not in knob.choices:
        raise JaxtuneError(f"{key} takes one of {', '.join(knob.choices)}, not {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise JaxtuneError(f"{key} takes a finite number, not {value!r}")
    if knob.minimum is not None and value < knob.minimum:
        raise JaxtuneError(f"{key} is at least {knob.minimum:g}, not {value!r}")
    if knob.maximum is not None and value > knob.maximum:
        raise JaxtuneError(f"{key} is at most {knob.maximum:g}, not {value!r}")
    return value


def _json_text(key: str, value: Any) -> str:
    """Returns a mapping, or JSON text of one, as JSON text; an empty one as an empty string."""
    if isinstance(value, ml_collections.ConfigDict):
        value = value.to_dict()
    try:
        given = json.loads(value or "{}") if isinstance(value, str) else value
        text = json.dumps(given, ensure_ascii=False, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise JaxtuneError(f"{key} takes a JSON object, not {value!r}: {error}") from error
    if not isinstance(given, Mapping):
        raise JaxtuneError(f"{key} takes a JSON object, not {value!r}")
    return text if given else ""


def _parse(key: str, text: str) -> Any:
    """Reads the value of a command-line override in the type of its knob."""
    knob = _knob(key)
    if isinstance(knob.default, str):
        return text
    if isinstance(knob.default, bool):
        words = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in words:
            raise JaxtuneError(f"{key} takes true or false, not {text!r}")
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # a list of names; anything else fails its type check


def resolve(
    config: ml_collections.ConfigDict | Mapping[str, Any], overrides: Sequence[str] = ()
) -> Config:
    """Checks a whole config, applies overrides and freezes it.

    Args:
      config: a tree of sections; keys that are absent take their default.
      overrides: ``"section.name=value"`` strings, applied in order. A length of the run among them
        (``training.steps``, ``epochs`` or ``tokens``) takes the place of the config's.

    Returns:
      An `ml_collections.FrozenConfigDict` of sections.

    Raises:
      JaxtuneError: an unknown key (the message names the closest one) or a bad value.
    """
    if not isinstance(config, (Mapping, ml_collections.ConfigDict)):
        raise JaxtuneError(f"a config is a tree of sections, not {config!r}")
    tree = {s: {n: knob.default for n, knob in entries.items()} for s, entries in KNOBS.items()}
    for section, entries in dict(config).items():
        if section not in KNOBS or not isinstance(entries, (Mapping, ml_collections.ConfigDict)):
            raise JaxtuneError(f'unknown config section "{section}"{closest(section, KNOBS)}')
        for name, value in dict(entries).items():
            tree[section][name] = _check(f"{section}.{name}", value)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise JaxtuneError(f"--config.{key} needs a value: --config.{key}=…")
        value = _check(key, _parse(key, text))
        section, name = key.split(".", 1)
        tree[section][name] = value
    _replace_length(tree["training"], [override.partition("=")[0] for override in overrides])
    batch, micro = tree["training"]["batch_size"], tree["training"]["accumulation"]
    if batch % micro:
        raise JaxtuneError(
            f"training.batch_size={batch} does not divide into training.accumulation={micro} "
            "micro-batches"
        )
    _check_length(tree["training"])
    return ml_collections.FrozenConfigDict(tree)


def _replace_length(training: dict[str, Any], overridden: Sequence[str]) -> None:
    """Lets a length of the run that was overridden take the place of another in the config."""
    names = [name for name in _LENGTHS if f"training.{name}" in overridden]
    if any(name == "steps" or training[name] for name in names):
        training |= {name: value for name, value in _LENGTHS.items() if name not in names}


def _check_length(training: Mapping[str, Any]) -> None:
    """Refuses two lengths of one run; training.steps at its default is none."""
    named = [name for name, default in _LENGTHS.items() if training[name] != default]
    if len(named) > 1:
        settings = " and ".join(f"training.{name}={training[name]}" for name in named)
        raise JaxtuneError(f"{settings}: a run has one length")


def load_file(path: str | Path) -> Any:
    """Runs a config file and returns what its ``get_config()`` returns.

    A config file is a Python program: run only files that you trust.

    Raises:
      JaxtuneError: no such file, no ``get_config``, or an error inside the file.
    """
    path = Path(path)
    if not path.is_file():
        there = [file.name for file in path.parent.glob("*.py")]
        raise JaxtuneError(f"{path}: no such config file{closest(path.name, there)}")
    spec = importlib.util.spec_from_file_location("jaxtune_config_file", path)
    if spec is None or spec.loader is None:
        raise JaxtuneError(f"{path}: a config file is a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except JaxtuneError:
        raise
    except Exception as error:
        line = error.lineno if isinstance(error, SyntaxError) else _line_within(path, error)
        reason = " ".join(str(error).split())
        raise JaxtuneError(f"{path}:{line}: {type(error).__name__}: {reason}") from error
    if not isinstance(config, (Mapping, ml_collections.ConfigDict)):
        raise JaxtuneError(f"{path}: get_config() returns {config!r} instead of a config")
    return config


def _line_within(path: Path, error: Exception) -> int:
    """Returns the number of the line in `path` that an error came from; 0 if none did."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno or 0 for frame in frames if Path(frame.filename) == path]
    return lines[-1] if lines else 0


def to_json(config: Config) -> str:
    """Renders a resolved config as the JSON that a run directory keeps."""
    return json.dumps(config.to_dict(), indent=2, ensure_ascii=False) + "\n"


def from_json(path: str | Path) -> Config:
    """Reads a config that `to_json` wrote; the config file that made it is never run again."""
    return resolve(json.loads(Path(path).read_text(encoding="utf-8")))
