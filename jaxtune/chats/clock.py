"""The date that a chat template prints, fixed for a run so that its tokens never change.

Templates get it from ``strftime_now(format)``, a global function of `transformers` that returns the
current time. `apply_chat_template` passes data to a template, but not functions. The clock is
therefore fixed in the template: a macro of the same name, prepended to it, shadows the function.
Jinja has no strftime, so the macro contains a table of the formatted values of every format and
directive that occurs in the template, and looks them up.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import re

from jaxtune.chats.template_process import percent_literals
from jaxtune.errors import JaxtuneError

_CALL = "strftime_now"
# A strftime directive with an optional flag or modifier; not the start of a Jinja block, {%if.
_DIRECTIVE = re.compile(r"(?<!\{)%[-_0^#EO]?[A-Za-z%]")
# A format that is a string literal of the template is looked up as a whole. Any other format, such
# as a concatenation, is scanned by character. `at.code` is the directive read so far, a percent
# sign, an optional flag and a letter; once complete, it is replaced by its value.
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
    # The renderer removes one newline after a block, so the template itself is unchanged.
    "{%%- endmacro %%}\n"
)


def now() -> datetime.datetime:
    """Returns the local time in whole seconds, without a time zone, as in `transformers`."""
    return datetime.datetime.now().replace(microsecond=0)


def read_clock(text: str, place: str) -> datetime.datetime:
    """Parses an ISO 8601 time; `place` is named in errors."""
    try:
        return datetime.datetime.fromisoformat(text)
    except (TypeError, ValueError) as error:
        raise JaxtuneError(f'{place}: "{text}" is not an ISO 8601 time') from error


def printed_values(source: str, clock: datetime.datetime) -> dict[str, str]:
    """Returns the values of a clock that a template may print, by format: ``{"%Y": "2026"}``.

    It is empty if the template does not use the time. Clocks with equal values give equal
    renderings.
    """
    if _CALL not in source:
        return {}
    return _format_values([*_DIRECTIVE.findall(source), *percent_literals(source)], clock)


def _format_values(formats: list[str], clock: datetime.datetime) -> dict[str, str]:
    """Returns the formatted clock by format."""
    values = {}
    for format_ in sorted(set(formats)):
        with contextlib.suppress(ValueError):  # the string is not a format
            values[format_] = clock.strftime(format_)
    return values


@functools.lru_cache(maxsize=32)
def fix_clock(source: str, clock: datetime.datetime) -> str:
    """Returns a template that renders like `source` at the time `clock`."""
    if _CALL not in source:
        return source
    whole = _format_values([*percent_literals(source)], clock)
    values = _format_values(_DIRECTIVE.findall(source), clock)
    return _MACRO % {"whole": repr(whole), "values": repr(values)} + source
