"""Rows that are known and cannot be trained on: what they are, so that an error can say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Data of `datasets`' own files and of LLaMA-Factory's list, by keys that nothing else has.
_DESCRIPTIONS = (
    (
        {"features", "splits"},
        "a description of a data set that `datasets` wrote: name its directory",
    ),
    ({"_data_files", "_fingerprint"}, "the state of a saved data set: name its directory"),
)
_LISTED = {"file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"}
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")


def find_media(values: Mapping[str, Any]) -> str:
    """Returns the key under which a row has images, sound or film, or an empty string."""
    return next((key for key in _MEDIA if values.get(key) not in (None, "", [], {}, b"")), "")


def find_preferences(values: Mapping[str, Any]) -> str:
    """Returns what a row says of how good its answers are, where that is what it teaches."""
    if values.get("chosen") is not None and values.get("rejected") is not None:
        return "chosen and rejected are preferences between answers, as DPO trains on"
    answer = "kto_tag" if "kto_tag" in values else "label" if "completion" in values else ""
    if isinstance(values.get(answer), bool):
        return f"{answer} says whether the answer is good, as KTO trains on"
    return ""


def describe_metadata(values: Mapping[str, Any]) -> str:
    """Returns what an object is that is no row, or an empty string."""
    for keys, what in _DESCRIPTIONS:
        if keys <= values.keys():
            return what
    inner = list(values.values())
    if inner and all(isinstance(value, Mapping) for value in inner):
        if any(_LISTED & value.keys() for value in inner):
            return "a list of data sets, such as LLaMA-Factory's: name a file that it lists"
        return _describe_columns(values)
    found = [key for key, value in values.items() if _is_rows(value)]
    if len(found) == 1:
        return f'an object with its rows under "{found[0]}": make a file of that array alone'
    if len(inner) > 1 and all(isinstance(value, list) for value in inner):
        return _describe_columns(values)
    return ""


def _describe_columns(values: Mapping[str, Any]) -> str:
    sizes = {len(value) for value in values.values()}
    many = len(sizes) == 1 and sizes != {0}
    return 'a table by columns: write it by rows (pandas: orient="records")' if many else ""


def _is_rows(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, (str, bytes))
        and len(value) > 0
        and all(isinstance(row, Mapping) for row in value)
    )
