"""A lower bound of the number of tokens of a text, from its bytes.

Tokenizing takes hundreds of bytes of memory for each byte of text. A row that certainly does not
fit its limit is therefore recognised without it: n bytes are at least n / m tokens, where m is the
number of bytes of the longest token, unless the tokenizer drops or merges parts of a text. The
bound is 0 for a tokenizer or a text of which that cannot be excluded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxtune.chats.tokens import unrepeated_ids
from jaxtune.strict_json import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Normalization to another form shortens a text in UTF-8 by less than this factor: compatibility
# characters at most fourfold (a mathematical digit), composition threefold (Hangul).
_NORMALIZATION = 16
_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
_KEEPING = ("ByteLevel", "Digits", "Metaspace")  # pre-tokenizers that keep the whole text
_SPLITTING = ("Split", "Punctuation")  # likewise, unless they remove what they split at


class TokenBound:
    """The bound for a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        """Reads the longest token and whether the tokenizer keeps a text."""
        backend: Any = tokenizer.backend_tokenizer
        described = parse_json(backend.to_str().encode(), "tokenizer.json", "file")
        factor = _normalization_factor(described["normalizer"])
        kept = _keeps_text(described["pre_tokenizer"]) and _keeps_characters(described, backend)
        added = tokenizer.added_tokens_decoder.values()
        self._added = tuple(str(token) for token in added)
        # Consecutive copies of BOS and EOS are merged; those of added tokens are found in a text.
        self._merged = [
            str(backend.id_to_token(token)) for token in unrepeated_ids(tokenizer, backend)
        ]
        kept = kept and set(self._merged) <= set(self._added)
        longest = max(map(len, map(str.encode, backend.get_vocab(True))), default=1)
        self._bytes_per_token = longest * factor if kept else 0
        # They remove any number of spaces next to them.
        self._stripping = [str(token) for token in added if token.lstrip or token.rstrip]

    def fewest_tokens(self, text: str, spans: Sequence[tuple[int, int]], complete: bool) -> int:
        """Returns the least number of tokens that `tokenize_batch` makes of a text.

        Args:
          text: text of an example.
          spans: spans to train on, in characters.
          complete: whether the text is tokenized with special tokens; see `tokenize_batch`.
        """
        if not self._bytes_per_token or any(token in text for token in self._stripping):
            return 0
        text = text.rstrip() if complete else text  # white space after an EOS is removed
        for start, stop in spans:
            said = text[start:stop]
            ends = [end for end in self._added if said.endswith(end)]
            if any(said.count(end) > 1 for end in ends):
                return 0  # a repeated end token is removed, with the white space before it
        merged = sum(len(token.encode()) * text.count(token) for token in self._merged)
        return max(0, len(text.encode()) - merged) // self._bytes_per_token


def _normalization_factor(normalizer: Mapping[str, Any] | None) -> int:
    """Returns a number of times that a normalizer shortens a text at most; 0 if it has no bound."""
    if normalizer is None:
        return 1
    kind = normalizer["type"]
    if kind == "Sequence":
        return math.prod(map(_normalization_factor, _parts(normalizer)))
    if kind in ("Prepend", "ByteLevel"):
        return 1
    if kind == "Replace":
        pattern, content = normalizer["pattern"].get("String"), normalizer["content"]
        return int(pattern is not None and len(pattern.encode()) <= len(content.encode()))
    return _NORMALIZATION if kind in _FORMS else 0


def _parts(described: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return described.get("normalizers") or described.get("pretokenizers") or ()


def _keeps_text(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    if pre_tokenizer is None or pre_tokenizer["type"] in _KEEPING:
        return True
    if pre_tokenizer["type"] == "Sequence":
        return all(map(_keeps_text, _parts(pre_tokenizer)))
    return pre_tokenizer["type"] in _SPLITTING and pre_tokenizer["behavior"] != "Removed"


def _keeps_characters(described: Mapping[str, Any], backend: Any) -> bool:
    """Returns whether unknown characters become a token each, or cannot occur."""
    from tokenizers import pre_tokenizers

    model = described["model"]
    if model["type"] != "BPE":
        return False
    if model["byte_fallback"] or (model["unk_token"] and not model["fuse_unk"]):
        return True
    split = described["pre_tokenizer"]
    kinds = [split, *_parts(split)] if split else []
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    byte_level = any(kind["type"] == "ByteLevel" for kind in kinds)
    return byte_level and set(alphabet) <= backend.get_vocab(False).keys()
