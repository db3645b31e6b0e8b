"""A row that cannot fit is refused by its bytes; the bound never exceeds the number of tokens."""

import copy
import json
import random

import pytest
from loading import load_examples
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jaxtune.chats.tokens import tokenize_batch
from jaxtune.data.token_bound import TokenBound
from jaxtune.errors import JaxtuneError

PIECES = ["a", "7", " ", "\n", "é", "e\u0301", "각", "𝟘", "ﷺ", "🎉", "你好", "the ", "<s>", "</s>"]
BYTES = pre_tokenizers.ByteLevel()


@pytest.fixture(scope="module")
def changed():
    """Makes byte-level tokenizers with a normalizer, another pre-tokenizer or added tokens."""
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = BYTES
    trained.train_from_iterator(["the aa bb 777 \n\n" * 9, "".join(PIECES) * 9], trainer)

    def make(normalizer=None, pre_tokenizer=BYTES, added=()):
        backend = copy.deepcopy(trained)
        backend.pre_tokenizer = pre_tokenizer
        if normalizer is not None:
            backend.normalizer = normalizer
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
        )
        tokenizer.add_tokens(list(added))
        return tokenizer

    return make


KINDS = {
    "plain": ({}, True),
    "nfc": ({"normalizer": normalizers.NFC()}, True),
    "nfkd": ({"normalizer": normalizers.NFKD()}, True),
    "replace": ({"normalizer": normalizers.Replace("a", "bc")}, True),
    "shorten": ({"normalizer": normalizers.Replace("aa", "")}, False),
    "strip": ({"normalizer": normalizers.Strip()}, False),
    "accents": ({"normalizer": normalizers.StripAccents()}, False),
    "words": (
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), BYTES])},
        False,
    ),
    "removed": (
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Split("7", "removed"), BYTES])},
        False,
    ),
    "stripping": ({"added": [AddedToken("<x>", lstrip=True, rstrip=True)]}, True),
}


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_never_exceeds_the_number_of_tokens(changed, kind, complete):
    options, bounded = KINDS[kind]
    tokenizer = changed(**options)
    bound, rng, largest = TokenBound(tokenizer), random.Random(0), 0
    texts = [piece * 2000 for piece in [*PIECES, "<x>", " <x>", "</s> \n"]]
    for _ in range(20):
        chosen = rng.choices([*PIECES, "<x>"], k=3)
        texts.append("".join(rng.choice(chosen) * rng.choice([1, 200]) for _ in range(20)))
    for text in texts:
        spans = [(len(text) // 2, len(text))]
        fewest = bound.fewest_tokens(text, spans, complete)
        (tokens,) = tokenize_batch(tokenizer, [text], [spans], complete=complete)
        assert fewest <= len(tokens.ids), text[:40]
        largest = max(largest, fewest)
    assert bool(largest) == bounded


@pytest.mark.parametrize("text", ["7", "a ", " "])
def test_a_row_that_cannot_fit_is_not_tokenized(deepseek, tmp_path, text):
    path = tmp_path / "rows.jsonl"
    small = {"prompt": "a", "completion": "b"}
    rows = [small, {"prompt": text * (2 * 10**6 // len(text)), "completion": "b"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"tokenizer": deepseek, "max_length": 64, "progress": False}
    with pytest.raises(JaxtuneError) as error:
        load_examples(path, **options)
    assert str(error.value) == (
        f"{path}:2: 2,000,001 characters, at least 7812 tokens exceed data.max_length=64; increase "
        "it, or set data.too_long to drop, truncate, truncate_start or windows"
    )
    examples = load_examples(path, too_long="drop", **options)
    assert (len(examples), examples.dropped, examples.rows_read) == (1, 1, 2)
