"""Detects the format of a row from its keys."""

from __future__ import annotations

from jaxtune.data.row_formats import DataFormat
from jaxtune.data.rows import Row
from jaxtune.data.unsupported import describe_metadata, find_media, find_preferences
from jaxtune.errors import JaxtuneError, closest, lookup
from jaxtune.registry import ROW_FORMATS

FORMATS: dict[str, DataFormat] = {name: entry.load() for name, entry in ROW_FORMATS.items()}


def detect_format(row: Row, chosen: str = "") -> str:
    """Returns the name of the format whose required keys a row has.

    Args:
      row: a row.
      chosen: name of the format to require; empty: detected.

    Raises:
      JaxtuneError: no format matches, or several do; the message lists the keys and the formats.
    """
    # In a table of `datasets`, a key that a row lacks has the value None.
    found = [key for key, value in row.values.items() if value is not None]
    if media := find_media(row.values):
        raise JaxtuneError(
            f'{row.place}: only text can be trained on, but the row has "{media}"; remove the key '
            "if the text makes sense without it"
        )
    if chosen:
        missing = [k for k in lookup(FORMATS, chosen, "data.format").keys if k not in found]
        if missing:
            raise JaxtuneError(
                f'{row.place}: no key "{missing[0]}"{closest(missing[0], found)} '
                f"(data.format={chosen} requires {' and '.join(FORMATS[chosen].keys)})"
            )
        return chosen
    fitting = [name for name, form in FORMATS.items() if set(form.keys) <= set(found)]
    if judgement := find_preferences(row.values):
        ways = f"keep only the good answers, in one of the formats {', '.join(FORMATS)}"
        if fitting:
            keys = " and ".join(FORMATS[fitting[0]].keys)
            ways += f", or set data.format={fitting[0]} to train on {keys}"
        raise JaxtuneError(f"{row.place}: {judgement}, which jaxtune does not support; {ways}")
    if len(fitting) == 1:
        return fitting[0]
    forms = ", ".join(f"{name} ({' + '.join(form.keys)})" for name, form in FORMATS.items())
    keys = ", ".join(found) or "none"
    if fitting:
        raise JaxtuneError(
            f"{row.place}: the keys {keys} match several formats; set data.format to "
            f"{' or '.join(fitting)} (formats: {forms})"
        )
    if what := describe_metadata(row.values):
        raise JaxtuneError(f"{row.place}: not a data row: {what}")
    known = [key for form in FORMATS.values() for key in form.keys]
    hints = [hint for key in found if key not in known and (hint := closest(key, known))]
    raise JaxtuneError(
        f"{row.place}: the keys {keys} match no known format{hints[0] if hints else ''} "
        f"(known: {forms}); rename the keys of the rows"
    )


def unread_keys(row: Row, form: str) -> set[str]:
    """Returns the keys of a row that its format does not use."""
    unread = set(row.values) - set(FORMATS[form].keys) - set(FORMATS[form].optional)
    # pandas writes its index as a column without a name.
    return {key or "(unnamed column)" for key in unread}
