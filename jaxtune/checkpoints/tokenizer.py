"""Loads the tokenizer of a checkpoint, from its files or from the metadata of a GGUF."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

from gguf.constants import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxtune.checkpoints.formats.gguf_header import read_header
from jaxtune.checkpoints.huggingface import resolve_path
from jaxtune.errors import JaxtuneError, lookup
from jaxtune.strict_json import MAX_BYTES, expect, read_object, read_text

_logger = logging.getLogger(__name__)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SETTINGS = "tokenizer_config.json"
_BESIDE = (
    *(_SETTINGS, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    "merges.txt",
)
_PROBE = 'def add(a, b):\n    return a + 12345  # two  spaces, "it\'s", 你好，世界 café\n'

# The patterns below are those of the tokenizer.json files of the original checkpoints.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS_AND_DIGITS = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _ranges(text: str) -> str:
    """Returns the inside of a character class from hexadecimal code points and ranges of them."""
    ends = (span.partition("-") for span in text.split())
    return "".join(rf"\x{{{first}}}-\x{{{last or first}}}" for first, _, last in ends)


_CJK = f"[{_ranges('4e00-9fa5 800-4e00 ac00-d7ff')}]+"
_CASED_LETTERS = _ranges(
    "41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376 377 37b-37d 37f "
    "386 388-38a 38c 38e-3a1 3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd "
    "1c90-1cba 1cbd-1cbf 1d00-1d2b 1d6b-1d77 1d79-1d9a 1e00-1f15 1f18-1f1d 1f20-1f45 "
    "1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4 "
    "1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 2115 "
    "2119-211d 2124 2126 2128 212a-212d 212f-2134 2139 213c-213f 2145-2149 214e 2183 2184 "
    "2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2 2cf3 a640-a66d a680-a69b a722-a76f a771-a787 "
    "a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a ff41-ff5a 10400-1044f 104b0-104d3 "
    "104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df 1e900-1e943"
)
_PUNCTUATION = _ranges("21-2f 3a-7e ff01-ff0f ff1a-ff5e 2018-201f 3000-3002")
_DEEPSEEK_V3_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Splitting(NamedTuple):
    """Pre-tokenization: how text is split into words before BPE merges.

    Attributes:
      steps: constructors of pre-tokenizers, applied in order before the byte-level mapping.
      byte_level_regex: whether GPT-2's pattern is applied too.
      normalizer: constructor of the normalizer; None for none.
      ignore_merges: whether a word in the vocabulary becomes one token regardless of merges.
      add_bos: whether BOS is prepended if the file does not specify it.
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
            _split(rf"\s?[{_PUNCTUATION}]+"),
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
        (
            _split(r"\p{N}{1,3}"),
            _split(f"[{_ranges('4e00-9fa5 3040-309f 30a0-30ff')}]+"),
            _split(_DEEPSEEK_V3_WORDS),
        )
    ),
}


def load_tokenizer(path: str | Path, revision: str | None = None) -> PreTrainedTokenizerFast | None:
    """Loads a tokenizer and checks that a probe text survives encoding and decoding.

    Args:
      path: a Hugging Face directory, a hub id or a ``.gguf`` file.
      revision: commit, tag or branch of a hub id.

    Returns:
      A fast tokenizer, or None if the directory or GGUF has none.

    Raises:
      JaxtuneError: a file cannot be read, the GGUF's pre-tokenizer is unknown, or the decoded probe
        differs from the encoded one.
    """
    local = resolve_path(str(path), revision or "")
    if local.is_dir():
        _check_files(local)
        if not any((local / name).is_file() for name in _TOKENIZER_FILES):
            return None
        tokenizer = _from_directory(local)
    else:
        metadata = read_header(local).metadata
        if "tokenizer.ggml.model" not in metadata:
            return None
        tokenizer = _from_gguf(local, metadata)
    ids = tokenizer.encode(_PROBE, add_special_tokens=False)
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if decoded != _PROBE:
        raise JaxtuneError(
            f"{local}: the tokenizer turns {_PROBE!r} into {decoded[:200]!r}: its class or its "
            "files do not fit each other"
        )
    return tokenizer


def _from_directory(directory: Path) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        file = _damaged(directory)
        raise JaxtuneError(f"{file}: the tokenizer cannot be read: {reason}") from error
    settings = {}
    if (directory / _SETTINGS).is_file():
        settings = read_object(directory / _SETTINGS)
        longest = settings.get("model_max_length")
        if longest is not None:  # encoding compares it with lengths
            expect(longest, float, f'{directory / _SETTINGS}: "model_max_length"')
        _compare_templates(directory, settings)
    # transformers ignores add_bos_token and add_eos_token if tokenizer.json has its own
    # post-processor, so the result of encoding is compared with the settings.
    ids = tokenizer.encode("a")
    has = (ids[:1] == [tokenizer.bos_token_id], ids[-1:] == [tokenizer.eos_token_id])
    wanted = (
        has[0] or (bool(settings.get("add_bos_token")) and tokenizer.bos_token_id is not None),
        has[1] or (bool(settings.get("add_eos_token")) and tokenizer.eos_token_id is not None),
    )
    if wanted != has:
        tokenizer.add_bos_token, tokenizer.add_eos_token = wanted
    return tokenizer


def _check_files(directory: Path) -> None:
    """Raises for files that transformers would take for missing, or would read at any size."""
    for name in (*_TOKENIZER_FILES, *_BESIDE):
        path = directory / name
        if path.is_symlink() and not path.exists():
            raise JaxtuneError(f"{path}: a link to a file that does not exist")
        if not path.exists():
            continue
        if not path.is_file():
            raise JaxtuneError(f"{path}: not a regular file")
        if path.stat().st_size > MAX_BYTES:
            raise JaxtuneError(f"{path}: larger than {MAX_BYTES >> 20} MiB")


def _damaged(directory: Path) -> Path:
    """Returns the file that keeps a tokenizer from being read, or the directory if it is unknown.

    Raises:
      JaxtuneError: the file cannot be read at all; the message says why.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in ("tokenizer.json", "added_tokens.json", "special_tokens_map.json", _SETTINGS):
        if (directory / name).exists():
            found[name] = read_object(directory / name)
    template = directory / "chat_template.jinja"
    if template.exists():
        read_text(template)
    if "tokenizer.json" in found:
        try:
            Tokenizer.from_str(json.dumps(found["tokenizer.json"]))
        except Exception:  # the only type of error that the library has
            return directory / "tokenizer.json"
    if not all(isinstance(value, int) for value in found.get("added_tokens.json", {}).values()):
        return directory / "added_tokens.json"
    for name in ("special_tokens_map.json", _SETTINGS):
        for key, value in found.get(name, {}).items():
            token = key.endswith("_token") and not key.startswith("add_")
            kinds = (str, NoneType, dict) if token else (str, NoneType)
            if (token or key == "tokenizer_class") and not isinstance(value, kinds):
                return directory / name
    return directory


def _compare_templates(directory: Path, settings: Mapping[str, Any]) -> None:
    """Logs a warning if a directory has two different chat templates."""
    file, stored = directory / "chat_template.jinja", settings.get("chat_template")
    if isinstance(stored, list):  # several templates, each with a name
        named = [entry for entry in stored if isinstance(entry, Mapping)]
        stored = next((e.get("template") for e in named if e.get("name") == "default"), "")
    if not stored or not file.is_file():
        return
    if read_text(file).strip() != str(stored).strip():
        _logger.warning(
            "%s: chat_template.jinja and tokenizer_config.json have different chat templates: "
            "using that of chat_template.jinja, as transformers does",
            directory,
        )


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
    if not all(isinstance(values, list) for values in (tokens, merges, kinds)):
        raise JaxtuneError(f"{path}: tokenizer.ggml.tokens, merges or token_type is not a list")
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
        if not isinstance(number, int) or not 0 <= number < len(tokens):
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
    """Builds the tokenizer; control tokens are special, user-defined ones are never split."""
    # Unused entries only pad the embedding; as tokens they would match their names in a text.
    vocabulary = {
        token: number
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind != TokenType.UNUSED
    }
    pairs = []
    for number, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        # The tokenizers library panics on some invalid merges, which Python cannot catch.
        if not {left, right, left + right} <= vocabulary.keys():
            raise JaxtuneError(
                f'{path}: tokenizer.ggml.merges[{number}]="{merge}" joins or '
                "produces an unknown token"
            )
        pairs.append((left, right))
    backend = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=splitting.ignore_merges))
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
