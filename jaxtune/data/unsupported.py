"""Recognition of rows that cannot be trained on, for specific error messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Metadata files of `datasets` and LLaMA-Factory, by their characteristic keys.
_DESCRIPTIONS = (
    (
        {"features", "splits"},
        "it is the dataset_info of a saved data set; use its directory instead",
    ),
    (
        {"_data_files", "_fingerprint"},
        "it is the state of a saved data set; use its directory instead",
    ),
)
_LISTED = {"file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"}
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")


def find_media(values: Mapping[str, Any]) -> str:
    """Returns the key of images, videos or audio in a row, or an empty string."""
    return next((key for key in _MEDIA if values.get(key) not in (None, "", [], {}, b"")), "")


def find_preferences(values: Mapping[str, Any]) -> str:
    """Returns a description of preference data in a row, or an empty string."""
    if values.get("chosen") is not None and values.get("rejected") is not None:
        return "chosen and rejected are preference pairs for DPO"
    answer = "kto_tag" if "kto_tag" in values else "label" if "completion" in values else ""
    if isinstance(values.get(answer), bool):
        return f"{answer} is a preference label for KTO"
    return ""


def describe_metadata(values: Mapping[str, Any]) -> str:
    """Returns a description of an object that is not a row, or an empty string."""
    for keys, what in _DESCRIPTIONS:
        if keys <= values.keys():
            return what
    inner = list(values.values())
    if inner and all(isinstance(value, Mapping) for value in inner):
        if any(_LISTED & value.keys() for value in inner):
            return "it is a list of data sets, as in LLaMA-Factory; use one of its files instead"
        return _describe_columns(values)
    found = [key for key, value in values.items() if _is_rows(value)]
    if len(found) == 1:
        return f'it has its rows under "{found[0]}"; save that array as a file of its own'
    if len(inner) > 1 and all(isinstance(value, list) for value in inner):
        return _describe_columns(values)
    return ""


def _describe_columns(values: Mapping[str, Any]) -> str:
    sizes = {len(value) for value in values.values()}
    many = len(sizes) == 1 and sizes != {0}
    return 'it is a table by columns; save it by rows (pandas: orient="records")' if many else ""


def _is_rows(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, (str, bytes))
        and len(value) > 0
        and all(isinstance(row, Mapping) for row in value)
    )
