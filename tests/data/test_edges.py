"""Tokens over the edge of prompt and answer are counted, and evaluation asks what was trained."""

from __future__ import annotations

import random

import pytest
from loading import load_examples

from jaxtune.chats.tokens import tokenize_batch
from jaxtune.config import resolve
from jaxtune.data import DataReader, tokenize_prompt
from jaxtune.data.report import render_statistics, statistics
from jaxtune.training.generation_eval import read_questions


def chat(answer):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


@pytest.mark.parametrize(
    ("row", "merged"),
    [
        ({"prompt": "apple is: ", "completion": "red"}, 1),
        ({"prompt": "apple is:", "completion": " red"}, 0),
        ({"prompt": "apple is:\n", "completion": "red"}, 0),
        ({"prompt": "a\n", "completion": "\nb"}, 1),
        ({"prompt": "1", "completion": "2"}, 1),
        ({"prompt": "", "completion": "red"}, 0),
        (chat("red"), 0),
        (chat("  red"), 0),  # a space does not join the line end before it
        (chat("\n\nred"), 1),
        ({"text": "apple is: red"}, 0),
        ({"input_ids": [1, 2], "labels": [1, 2]}, 0),
    ],
)
def test_rows_in_which_a_token_joins_prompt_and_answer_are_counted(chatml, jsonl, row, merged):
    examples = load_examples(jsonl(row, row), tokenizer=chatml, max_length=64)
    assert examples.merged == 2 * merged
    assert examples.merged_place.endswith("rows.jsonl:1" if merged else "")
    assert statistics(examples)["merged"] == 2 * merged
    assert f"merged        {2 * merged:>12}" in render_statistics("train", statistics(examples))
    # A question ends where learning begins, so it is what was trained, merged or not.
    if "text" not in row:
        (question,) = read_questions(examples, 1)
        asked = [*question.prompt, *question.answer]
        assert asked == examples.tokens[0][: len(asked)].tolist()


def test_a_row_is_counted_where_its_prompt_alone_has_other_tokens(deepseek):
    """The tokenizer's own ids of the prompt are a beginning of the row's, or the row is counted."""
    draw, counted = random.Random(0), 0
    for _ in range(300):
        pieces = "ab 1名🎉\n .é"
        prompt, answer = ("".join(draw.choices(pieces, k=draw.randint(1, 6))) for _ in range(2))
        span = (len(prompt), len(prompt) + len(answer))
        (tokens,) = tokenize_batch(deepseek, [prompt + answer], [[span]], complete=True)
        asked = tokenize_prompt(deepseek, prompt)
        assert (tokens.ids[: len(asked)].tolist() != asked) == tokens.merged, (prompt, answer)
        counted += tokens.merged
    assert 30 < counted < 270


def test_the_warning_comes_once_and_names_a_row(chatml, jsonl, caplog):
    path = jsonl({"prompt": "a:", "completion": " b"}, *[{"prompt": "a: ", "completion": "b"}] * 3)
    config = resolve({}, [f"data.train={path}", "data.max_length=16"])
    DataReader(config, chatml, None).splits()
    named = [record.message for record in caplog.records if "a token spans" in record.message]
    assert len(named) == 1
    assert f"in 3 of 4 rows (e.g. {path}:2" in named[0]


@pytest.mark.parametrize(
    ("max_length", "positions", "said"),
    [
        (16, 16, None),
        (16, None, None),
        (17, 16, "data.max_length=17 exceeds the model's max_position_embeddings=16"),
        (16, 8, r"2 of 3 examples \(up to 12 tokens\) are longer than .*embeddings=8"),
    ],
)
def test_rows_longer_than_the_positions_of_the_model_are_logged(
    jsonl, caplog, max_length, positions, said
):
    rows = [{"input_ids": [1] * n, "labels": [1] * n} for n in (8, 9, 12)]
    config = resolve({}, [f"data.train={jsonl(*rows)}", f"data.max_length={max_length}"])
    DataReader(config, None, None, max_positions=positions).splits()
    named = [record.message for record in caplog.records if "max_position" in record.message]
    assert len(named) == (said is not None)
    if said:
        import re

        assert re.search(said, named[0])


def test_a_token_that_the_model_has_no_row_for_names_the_way_out(chatml, jsonl):
    config = resolve({}, [f"data.train={jsonl(chat('red'))}", "data.max_length=64"])
    reader = DataReader(config, chatml, chatml.convert_tokens_to_ids("<|im_start|>"))
    with pytest.raises(
        ValueError,
        match=r'rows\.jsonl:1: the tokenizer encodes "<\|im_start\|>" as \d+, which is outside the '
        r"model's vocabulary \(ids 0 to \d+\); `jaxtune convert --vocab-size N` resizes .*",
    ):
        reader.splits()
