"""`Model.generate` and `jaxtune generate`: forms of prompts, stop strings, streams."""

import sys

import numpy as np
import pytest

import jaxtune
from jaxtune.cli import main

CHAT = [{"role": "user", "content": "a1"}]
SAMPLED = {"max_new_tokens": 40, "temperature": 1.5, "seed": 0}


@pytest.fixture(scope="module")
def model(tiny_chat):
    return jaxtune.load(tiny_chat, dtype="float32", progress=False)


@pytest.fixture(scope="module")
def answers(model):
    """Answers of 40 tokens, of single bytes, to a text and a chat."""
    return model.generate(["once upon", CHAT], **SAMPLED)


def test_one_prompt_has_one_answer(model):
    text, ids = "once upon", model.encode("once upon")
    (expected,) = model.generate([text], 8)
    assert isinstance(expected, str) and expected
    for prompt in (text, ids, np.array(ids)):
        assert model.generate(prompt, 8) == expected
    assert model.generate([ids, text], 8) == [expected] * 2
    (of_chat,) = model.generate([CHAT], 8)
    assert model.generate(CHAT, 8) == of_chat != expected
    assert model.generate([], 8) == []
    assert model.generate((text for _ in range(2)), 8) == [expected] * 2


def test_answers_beyond_the_positions_of_the_model_are_announced(model, caplog):
    limit = model.definition.config["max_position_embeddings"]
    model.generate([0] * (limit - 2), 2)
    assert not caplog.messages
    model.generate([0] * (limit - 2), 3)
    assert f"{limit + 1} tokens" in caplog.text and f"embeddings={limit}" in caplog.text


def test_streams_add_up_to_the_answers(model, answers):
    assert "".join(model.generate("once upon", stream=True, **SAMPLED)) == answers[0]
    parts = ["", ""]
    for index, piece in model.generate(["once upon", CHAT], stream=True, **SAMPLED):
        parts[index] += piece
    assert parts == answers


def test_a_stream_begins_before_the_answer_is_complete(model, answers):
    pieces = model.generate("once upon", stream=True, **SAMPLED)
    first = next(pieces)
    assert first and len(first) < 8 < len(answers[0])


def test_an_answer_ends_before_its_stop_string(model, answers):
    stop = answers[0][9:13]  # several tokens, and so over the boundary of a chunk
    expected = answers[0][: answers[0].index(stop)]
    assert model.generate("once upon", stop=stop, **SAMPLED) == expected
    assert model.generate("once upon", stop=["no such text", stop], **SAMPLED) == expected
    assert "".join(model.generate("once upon", stop=stop, stream=True, **SAMPLED)) == expected
    both = model.generate(["once upon", CHAT], stop=stop, **SAMPLED)
    assert both == [expected, answers[1].split(stop)[0]]


def test_a_stop_string_that_is_a_token_ends_the_answer_as_a_token(model):
    """The text lacks special tokens, so a search of the text would not find them."""
    model.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    ids = [token for token in range(160) if token not in model.stop_ids]
    tokens = model.generate_tokens([ids[:3]], 30, jaxtune.Sampling(2.0, seed=1))[0]
    start = model.tokenizer.convert_tokens_to_ids("<|im_start|>")
    from jaxtune.generation.text import stop_tokens

    assert stop_tokens(model.tokenizer, ["<|im_start|>", "x"]) == [start]
    with_stop = model.generation([ids[:3]], 30, jaxtune.Sampling(2.0, seed=1), stop=[tokens[7]])
    (answer,) = with_stop.complete()
    assert answer.tokens == tokens[: tokens.index(tokens[7])]


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt 1 has no tokens"),
        (["a", []], {}, "prompt 2 has no tokens"),
        ([CHAT[0], "text"], {}, "a prompt mixes chat messages with something else"),
        (CHAT[0], {}, "a single message is not a prompt: give a list of chat messages"),
        ("a", {"top_k": -1}, "top_k=-1 is not"),
        ("a", {"stop": ""}, "stop='' is not a text"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens=0 is not"),
    ],
)
def test_errors_come_before_the_first_token(prompt, options, message, model):
    for stream in (False, True):
        with pytest.raises(jaxtune.JaxtuneError, match=message):
            model.generate(prompt, stream=stream, **options)


def run(capsys, tiny_chat, *flags):
    main(["generate", "--model", str(tiny_chat), "--max-new-tokens", "16", *flags])
    return capsys.readouterr().out


def test_the_command_streams_and_stops(tiny_chat, capsys, monkeypatch):
    model = jaxtune.load(tiny_chat, progress=False)
    options = {"max_new_tokens": 16, "temperature": 2.0, "top_k": 30, "seed": 4}
    flags = ["--raw", "--prompt", "once", "--temperature", "2", "--top-k", "30", "--seed", "4"]
    answer = model.generate("once", **options)
    stop = answer[5:7]
    expected = answer[: answer.index(stop)]
    for stream in ("--stream", "--no-stream"):
        assert run(capsys, tiny_chat, *flags, stream) == f"{answer}\n"
        assert run(capsys, tiny_chat, *flags, stream, "--stop", stop) == f"{expected}\n"
    several = run(capsys, tiny_chat, *flags, "--prompt", "upon")
    answers = model.generate(["once", "upon"], **options)
    assert several == "".join(
        f">>> {prompt}\n{text}\n" for prompt, text in zip(["once", "upon"], answers, strict=True)
    )
    with pytest.raises(SystemExit):
        run(capsys, tiny_chat, *flags, "--prompt", "upon", "--stream")
    assert "--stream takes a single --prompt" in capsys.readouterr().err
    written = []
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "write", lambda text: written.append(text) or len(text))
    main(["generate", "--model", str(tiny_chat), "--max-new-tokens", "16", *flags])
    assert "".join(written) == f"{answer}\n" and len(written) > 3
