"""The date that a chat template prints: fixed for a run, so that its tokens never change.

Templates ask for it with ``strftime_now(format)``, a global function of `transformers`, whose value
is the time of the call. The renderer passes data on to a template, but no functions, so the clock
is fixed in the template itself: a macro of that name in front of it hides the global function.
"""

from __future__ import annotations

import datetime
import functools
import re

from jaxtune.errors import JaxtuneError

_CALL = "strftime_now"
# A directive of strftime with GNU's flag or width; not what opens a Jinja block, as in {%if.
_DIRECTIVE = re.compile(r"(?<!\{)%[-_0^#]?[A-Za-z%]")
# Walks over the format: a directive is a percent sign, perhaps a flag, and a letter.
_MACRO = (
    "{%%- macro strftime_now(format) -%%}"
    "{%%- set at = namespace(code='') -%%}"
    "{%%- for c in format -%%}"
    "{%%- if not at.code and c != '%%' -%%}{{ c }}"
    "{%%- else -%%}"
    "{%%- set at.code = at.code ~ c -%%}"
    "{%%- if at.code in %(values)s -%%}{{ %(values)s[at.code] }}{%%- set at.code = '' -%%}"
    "{%%- elif at.code | length > 2 or (at.code | length == 2 and c not in '-_0^#') -%%}"
    "{{ raise_exception('strftime_now: the template itself has no ' ~ at.code) }}"
    "{%%- endif -%%}"
    "{%%- endif -%%}"
    "{%%- endfor -%%}"
    # The renderer drops one line end after a block, so what follows begins as it did.
    "{%%- endmacro %%}\n"
)


def now() -> datetime.datetime:
    """Returns the local time in whole seconds, without a time zone, as `transformers` takes it."""
    return datetime.datetime.now().replace(microsecond=0)


def read_clock(text: str, place: str) -> datetime.datetime:
    """Returns the time that ISO 8601 text means; raises naming `place`."""
    try:
        return datetime.datetime.fromisoformat(text)
    except (TypeError, ValueError) as error:
        raise JaxtuneError(f'{place}: "{text}" is not a time in ISO 8601') from error


def printed(source: str, clock: datetime.datetime) -> dict[str, str]:
    """Returns what of a clock a template can print: values by directive, as in ``{"%Y": "2026"}``.

    Empty where the template does not ask for the time. Two clocks that give the same render every
    conversation the same.
    """
    if _CALL not in source:
        return {}
    return {code: clock.strftime(code) for code in sorted(set(_DIRECTIVE.findall(source)))}


@functools.lru_cache(maxsize=32)
def fix_clock(source: str, clock: datetime.datetime) -> str:
    """Returns a template that renders as `source` does at the time `clock`."""
    if _CALL not in source:
        return source
    return _MACRO % {"values": repr(printed(source, clock))} + source
