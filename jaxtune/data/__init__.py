"""Data: read rows, render and tokenize them, mark their targets, pack them into batches."""

from jaxtune.data.examples import Examples, load_examples
from jaxtune.data.formats import FORMATS, DataFormat
from jaxtune.data.loader import Batch, Loader, eval_batches
from jaxtune.data.read import Row, read_rows
from jaxtune.data.template import IGNORE, ChatTemplate, Tokenized, encode_prompt

__all__ = [
    "FORMATS",
    "IGNORE",
    "Batch",
    "ChatTemplate",
    "DataFormat",
    "Examples",
    "Loader",
    "Row",
    "Tokenized",
    "encode_prompt",
    "eval_batches",
    "load_examples",
    "read_rows",
]
