"""The date that a chat template prints: fixed for a run, so that its tokens never change.

Templates ask for it with ``strftime_now(format)``, a global function of `transformers`, whose value
is the time of the call. The renderer passes data on to a template, but no functions, so the clock
is fixed in the template itself: a macro of that name in front of it hides the global function.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import re

import jinja2

from jaxtune.errors import JaxtuneError

_CALL = "strftime_now"
# A directive of strftime with a flag or modifier; not what opens a Jinja block, as in {%if.
_DIRECTIVE = re.compile(r"(?<!\{)%[-_0^#EO]?[A-Za-z%]")
# A format that stands in the template as a string is known whole. One that is put together is
# walked over: a directive is a percent sign, perhaps a flag, and a letter.
_MACRO = (
    "{%%- macro strftime_now(format) -%%}"
    "{%%- set whole = %(whole)s -%%}"
    "{%%- if format in whole -%%}{{ whole[format] }}{%%- else -%%}"
    "{%%- set at = namespace(code='') -%%}"
    "{%%- for c in format -%%}"
    "{%%- if not at.code and c != '%%' -%%}{{ c }}"
    "{%%- else -%%}"
    "{%%- set at.code = at.code ~ c -%%}"
    "{%%- if at.code in %(values)s -%%}{{ %(values)s[at.code] }}{%%- set at.code = '' -%%}"
    "{%%- elif at.code | length > 2 or (at.code | length == 2 and c not in '-_0^#EO') -%%}"
    "{{ raise_exception('strftime_now: the template itself has no ' ~ at.code) }}"
    "{%%- endif -%%}"
    "{%%- endif -%%}"
    "{%%- endfor -%%}"
    "{{ at.code }}"
    "{%%- endif -%%}"
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


def printed_values(source: str, clock: datetime.datetime) -> dict[str, str]:
    """Returns what of a clock a template can print: values by format, as in ``{"%Y": "2026"}``.

    Empty where the template does not ask for the time. Two clocks that give the same render every
    conversation the same.
    """
    if _CALL not in source:
        return {}
    return _format_values([*_DIRECTIVE.findall(source), *_strings(source)], clock)


def _strings(source: str) -> list[str]:
    """Returns the strings of a template that may be formats."""
    found = []
    with contextlib.suppress(jinja2.TemplateSyntaxError, UnicodeDecodeError):  # the renderer names
        for _, kind, text in jinja2.Environment().lex(source):
            if kind == "string" and "%" in text:
                escaped = text[1:-1].encode("ascii", "backslashreplace")  # as Jinja reads strings
                found.append(escaped.decode("unicode-escape"))
    return found


def _format_values(formats: list[str], clock: datetime.datetime) -> dict[str, str]:
    values = {}
    for format_ in sorted(set(formats)):
        with contextlib.suppress(ValueError):  # a string that is no format
            values[format_] = clock.strftime(format_)
    return values


@functools.lru_cache(maxsize=32)
def fix_clock(source: str, clock: datetime.datetime) -> str:
    """Returns a template that renders as `source` does at the time `clock`."""
    if _CALL not in source:
        return source
    whole = _format_values(_strings(source), clock)
    values = _format_values(_DIRECTIVE.findall(source), clock)
    return _MACRO % {"whole": repr(whole), "values": repr(values)} + source
