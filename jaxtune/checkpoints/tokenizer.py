"""Loads the tokenizer of a checkpoint, from its own files or from the metadata of a GGUF."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gguf.constants import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxtune.checkpoints.gguf_header import read_header
from jaxtune.checkpoints.huggingface import resolve_path
from jaxtune.errors import JaxtuneError, lookup

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_PROBE = 'def add(a, b):\n    return a + 12345  # two  spaces, "it\'s", 你好，世界 café\n'

# The patterns below are what the checkpoints' own tokenizer.json files say.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS_AND_DIGITS = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CJK = "[一-龥ࠀ-一가-퟿]+"
_CASED_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝ"
    "Ὗ-ώᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿ"
    "ﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_DEEPSEEK_V3_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^"""
    "\r\n"
    r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+["
    "\r\n"
    r"]*|\s*["
    "\r\n"
    r"]+|\s+(?!\S)|\s+"
)


class _Splitting(NamedTuple):
    """How text is cut up before its bytes are merged.

    Attributes:
      steps: applied in order, before bytes become characters.
      byte_level_regex: whether GPT-2's own pattern is applied too.
      normalizer: makes the normalizer; None for text as it is.
      ignore_merges: whether a word of the vocabulary stays whole whatever the merges say.
      add_bos: whether BOS is put first where the file does not say.
    """

    steps: tuple[Callable[[], Any], ...] = ()
    byte_level_regex: bool = False
    normalizer: Callable[[], Any] | None = None
    ignore_merges: bool = False
    add_bos: bool = False


def _split(pattern: str) -> Callable[[], Any]:
    return lambda: pre_tokenizers.Split(Regex(pattern), "isolated")


def _digits() -> Any:
    return pre_tokenizers.Digits(individual_digits=True)


_QWEN2 = _Splitting((_split(_WORDS_AND_DIGITS % ""),), normalizer=normalizers.NFC)
_SPLITTINGS = {
    "gpt-2": _Splitting(byte_level_regex=True),
    "smollm": _Splitting((_digits,), byte_level_regex=True),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _Splitting(
        (_split(_WORDS_AND_DIGITS % "{1,3}"),), ignore_merges=True, add_bos=True
    ),
    "deepseek-llm": _Splitting(
        (
            _split("[\r\n]"),
            _split(rf"\s?[{_CASED_LETTERS}]+"),
            _split(r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+"),
            _split(r"\s+$"),
            _split(_CJK),
            _digits,
        )
    ),
    "deepseek-coder": _Splitting(
        (
            _split("[\r\n]"),
            _split(r"\s?\p{L}+"),
            _split(r"\s?\p{P}+"),
            _split(_CJK),
            _digits,
        )
    ),
    "deepseek-v3": _Splitting(
        (_split(r"\p{N}{1,3}"), _split("[一-龥぀-ゟ゠-ヿ]+"), _split(_DEEPSEEK_V3_WORDS))
    ),
}


def load_tokenizer(path: str | Path, revision: str | None = None) -> PreTrainedTokenizerFast | None:
    """Loads a tokenizer and makes sure that it gives back the text it is given.

    Args:
      path: a Hugging Face directory, a hub id or a ``.gguf`` file.
      revision: commit, tag or branch of a hub id.

    Returns:
      A fast tokenizer, or None for a directory without tokenizer files.

    Raises:
      JaxtuneError: files that cannot be read, an unknown GGUF pre-tokenizer, or text that decodes
        to something else than was encoded.
    """
    local = resolve_path(str(path), revision or "")
    if local.is_dir():
        if not any((local / name).is_file() for name in _TOKENIZER_FILES):
            return None
        tokenizer = _from_directory(local)
    else:
        tokenizer = _from_gguf(local, read_header(local).metadata)
    ids = tokenizer.encode(_PROBE, add_special_tokens=False)
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if decoded != _PROBE:
        raise JaxtuneError(
            f"{local}: the tokenizer turns {_PROBE!r} into {decoded!r}: its class or its files do "
            "not fit each other"
        )
    return tokenizer


def _from_directory(directory: Path) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise JaxtuneError(f"{directory}: the tokenizer cannot be read: {reason}") from error
    settings = {}
    if (directory / "tokenizer_config.json").is_file():
        settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    # transformers drops both settings where tokenizer.json brings a post-processor of its own.
    ids = tokenizer.encode("a")
    if settings.get("add_bos_token") and ids[0] != tokenizer.bos_token_id:
        tokenizer.add_bos_token = True
    if settings.get("add_eos_token") and ids[-1] != tokenizer.eos_token_id:
        tokenizer.add_eos_token = True
    return tokenizer


def _from_gguf(path: Path, metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Builds a byte-level BPE tokenizer from a GGUF's metadata."""

    def entry(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    if entry("model") != "gpt2":
        raise JaxtuneError(
            f'{path}: tokenizer.ggml.model="{entry("model")}" is unknown (known: gpt2, which is '
            "byte-level BPE)"
        )
    name = entry("pre", "")
    splitting = lookup(_SPLITTINGS, name, f"{path}: tokenizer.ggml.pre")
    tokens, merges = entry("tokens", []), entry("merges", [])
    kinds = entry("token_type", [int(TokenType.NORMAL)] * len(tokens))
    if not tokens or len(kinds) != len(tokens):
        raise JaxtuneError(f"{path}: {len(tokens)} tokenizer.ggml.tokens, {len(kinds)} token types")
    backend = _byte_level_bpe(path, splitting, tokens, kinds, merges)
    special = {}
    for role, key in (
        ("bos_token", "bos"),
        ("eos_token", "eos"),
        ("pad_token", "padding"),
        ("unk_token", "unknown"),
    ):
        number = entry(f"{key}_token_id")
        if number is None:
            continue
        if not 0 <= number < len(tokens):
            raise JaxtuneError(
                f"{path}: tokenizer.ggml.{key}_token_id={number} is outside the vocabulary of "
                f"{len(tokens)}"
            )
        special[role] = tokens[number]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=bool(entry("add_bos_token", splitting.add_bos)),
        add_eos_token=bool(entry("add_eos_token", False)),
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _byte_level_bpe(
    path: Path,
    splitting: _Splitting,
    tokens: Sequence[str],
    kinds: Sequence[int],
    merges: Sequence[str],
) -> Tokenizer:
    """Builds the tokenizer itself; control tokens are special, user-defined ones matched whole."""
    # An unused entry only pads the embedding; as a token it would match its own name in a text.
    vocabulary = {
        token: number
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind != TokenType.UNUSED
    }
    pairs = [tuple(merge.split(" ")) for merge in merges]
    try:
        model = models.BPE(vocabulary, pairs, ignore_merges=splitting.ignore_merges)
    except Exception as error:
        raise JaxtuneError(f"{path}: tokenizer.ggml.merges do not fit: {error}") from error
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(step() for step in splitting.steps),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.byte_level_regex),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    if splitting.normalizer is not None:
        backend.normalizer = splitting.normalizer()
    for kind, special in ((TokenType.CONTROL, True), (TokenType.USER_DEFINED, False)):
        added = [
            AddedToken(token, normalized=False, special=special)
            for token, its_kind in zip(tokens, kinds, strict=True)
            if its_kind == kind
        ]
        backend.add_special_tokens(added) if special else backend.add_tokens(added)
    return backend
