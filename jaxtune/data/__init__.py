"""Training data: reads, renders and tokenizes rows, marks targets and packs batches."""

from jaxtune.chats.template import ChatTemplate, encode_prompt
from jaxtune.chats.tokens import IGNORE, Tokenized, tokenize_prompt
from jaxtune.data.batches import Batch, BatchLoader, eval_batches, eval_order
from jaxtune.data.detect_format import FORMATS
from jaxtune.data.examples import Examples, SourceSlice
from jaxtune.data.passes import DataOrder
from jaxtune.data.prepare import load_examples
from jaxtune.data.row_formats import DataFormat
from jaxtune.data.rows import Row, read_rows
from jaxtune.data.settings import DataSettings, data_settings
from jaxtune.data.splits import DataReader, ReaderOptions, Splits

__all__ = [
    "FORMATS",
    "IGNORE",
    "Batch",
    "BatchLoader",
    "ChatTemplate",
    "DataFormat",
    "DataOrder",
    "DataReader",
    "DataSettings",
    "Examples",
    "ReaderOptions",
    "Row",
    "SourceSlice",
    "Splits",
    "Tokenized",
    "data_settings",
    "encode_prompt",
    "eval_batches",
    "eval_order",
    "load_examples",
    "read_rows",
    "tokenize_prompt",
]
