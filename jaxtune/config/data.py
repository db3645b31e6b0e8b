"""The ``data`` section: rows, their targets and how they fill batches."""

from __future__ import annotations

import dataclasses

from jaxtune.config.option import Section, option
from jaxtune.registry import ROW_FORMATS


@dataclasses.dataclass(frozen=True)
class DataConfig(Section):
    """The ``data`` section."""

    train: str = option(
        "",
        "training examples: files (.jsonl, .json, .csv, .tsv, .txt, .parquet; .gz, .zst), glob "
        "patterns, directories, saved data sets or hub ids, separated by commas; NAME@2 shows "
        "a source twice per epoch",
    )
    eval: str = option("", "held-out examples, in the same forms; empty: only data.eval_split")
    eval_split: float = option(
        0.0,
        "rows held out of data.train: a count, or a fraction below 1; selected by content hash",
        minimum=0,
        maximum=10**15,
    )
    overlap: str = option(
        "error",
        "rows of data.eval that also occur in data.train: error, drop (from data.train) or keep",
        choices=("error", "drop", "keep"),
    )
    revision: str = option("", "commit, tag or branch of data sets with a hub id")
    format: str = option(
        "",
        "row format: messages, prompt-completion, alpaca, sharegpt, text or tokenized; empty: "
        "detected from the keys",
        choices=("", *ROW_FORMATS),
    )
    targets: str = option(
        "all",
        "trained turns of a conversation: all (assistant turns without train: false), last (the "
        "last one) or marked (those with train: true)",
        choices=("all", "last", "marked"),
    )
    reasoning: str = option(
        "keep",
        "reasoning of assistant turns, up to </think>: keep or drop",
        choices=("keep", "drop"),
    )
    empty_reasoning: str = option(
        "learn",
        "the empty think block that a template writes for a turn without reasoning: learn (as a "
        "target) or mask",
        choices=("learn", "mask"),
    )
    max_length: int = option(1024, "number of tokens in a row of a batch", minimum=2)
    packing: bool = option(True, "pack several examples into a row (best fit)")
    shuffle: bool = option(True, "shuffle in every epoch, as a function of training.seed")
    too_long: str = option(
        "error",
        "examples longer than data.max_length: error, drop, truncate (the end), truncate_start or "
        "windows (several examples); each is counted",
        choices=("error", "drop", "truncate", "truncate_start", "windows"),
    )
    bad_rows: str = option(
        "error",
        "unusable rows: error, or skip (the log names each of them)",
        choices=("error", "skip"),
    )
    bad_rows_limit: int = option(
        100, "data.bad_rows=skip: maximum number of skipped rows", minimum=0
    )
    chat_template: str = option(
        "",
        "chat template that replaces the checkpoint's: a Jinja file, or the name of a built-in "
        "one such as deepseek-v3",
    )
    chat_template_kwargs: str = option(
        "",
        'arguments of the chat template, a JSON object such as {"enable_thinking": false}; '
        "a row's own chat_template_kwargs take precedence",
        json=True,
    )
    prompt_templates: str = option(
        "",
        "augmentation: a file with one wording per line that contains {prompt}; each prompt is "
        "inserted into one of them",
    )
    mask_tokens: float = option(
        0.0,
        "augmentation: fraction of input tokens replaced by random tokens of the data, redrawn in "
        "every epoch; targets are kept",
        minimum=0,
        maximum=0.9,
    )
    cache: str = option(
        "",
        "directory in which jaxtune data prepare stores tokenized data; empty: "
        "~/.cache/jaxtune/data",
    )
