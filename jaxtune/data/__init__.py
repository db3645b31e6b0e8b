"""Data: read rows, render and tokenize them, mark their targets, pack them into batches."""

from jaxtune.chats.template import ChatTemplate, encode_prompt
from jaxtune.chats.tokens import IGNORE, Tokenized, tokenize_prompt
from jaxtune.data.encode import Settings, settings_from
from jaxtune.data.examples import Examples, Part
from jaxtune.data.formats import FORMATS, DataFormat
from jaxtune.data.load import load_examples
from jaxtune.data.loader import Batch, Loader, eval_batches, eval_order
from jaxtune.data.passes import DataOrder
from jaxtune.data.read import Row, read_rows
from jaxtune.data.splits import DataReader, Splits

__all__ = [
    "FORMATS",
    "IGNORE",
    "Batch",
    "ChatTemplate",
    "DataFormat",
    "DataOrder",
    "DataReader",
    "Examples",
    "Loader",
    "Part",
    "Row",
    "Settings",
    "Splits",
    "Tokenized",
    "encode_prompt",
    "eval_batches",
    "eval_order",
    "load_examples",
    "read_rows",
    "settings_from",
    "tokenize_prompt",
]
