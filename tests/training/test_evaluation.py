"""Evaluations while a run trains: several sets, answers, stopping and what is kept."""

import json

import numpy as np
import pytest

import jaxtune
from jaxtune.data.splits import parse_eval_sets
from jaxtune.errors import JaxtuneError
from jaxtune.training.generation_eval import read_questions


def test_sets_have_names_or_there_is_one():
    assert parse_eval_sets("") == {}
    assert parse_eval_sets("some/a.jsonl") == {"": "some/a.jsonl"}
    assert parse_eval_sets("law=a.jsonl, code=b=c.jsonl") == {"law": "a.jsonl", "code": "b=c.jsonl"}
    for text in ("law=a.jsonl,b.jsonl", "law=", "law=a.jsonl,law=b.jsonl"):
        with pytest.raises(JaxtuneError, match=r"data\.eval: "):
            parse_eval_sets(text)


def test_a_file_with_an_equals_sign_in_its_name_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "law=a.jsonl").touch()
    assert parse_eval_sets("law=a.jsonl") == {"": "law=a.jsonl"}


def test_a_question_is_all_before_the_last_answer():
    ignore = -100
    from jaxtune.data import Examples

    tokens = np.array([5, 6, 7, 8, 9, 10, 11, 2])
    targets = np.array([ignore, 7, ignore, ignore, 10, 11, 2, ignore])
    (question,) = read_questions(Examples([tokens], [targets], ["rows:1"]), 5)
    assert question.prompt == [5, 6, 7, 8, 9]
    assert question.answer == [10, 11, 2]


def write(path, letters, count=8):
    rows = []
    for index in range(count):
        letter = letters[index % len(letters)]
        turns = [
            {"role": "user", "content": f"{letter}{index}"},
            {"role": "assistant", "content": letter * 2},
        ]
        rows.append(json.dumps({"messages": turns}) + "\n")
    path.write_text("".join(rows))
    return path


def sections(model, train, held_out, **changes):
    base = {
        "model": {"path": str(model)},
        "data": {
            "train": str(train),
            "eval": str(held_out),
            "overlap": "keep",
            "max_length": 64,
        },
        "adapter": {"rank": 8, "targets": "all-linear"},
        "training": {"steps": 40, "batch_size": 2, "dtype": "float32"},
        "optimizer": {"learning_rate": 1e-2, "schedule": "constant"},
        "checkpoint": {"every": 5},
        "evaluation": {"every": 5, "batch_size": 4},
        "logging": {"tensorboard": False},
    }
    return base | {name: base.get(name, {}) | values for name, values in changes.items()}


def test_every_set_has_its_scores_and_answers_are_written_down(tiny_chat, tmp_path):
    train = write(tmp_path / "train.jsonl", "abcd", 16)
    other = write(tmp_path / "other.jsonl", "xyz", 6)
    config = sections(tiny_chat, train, f"same={train},other={other}")
    config["evaluation"] |= {"every": 40, "generate": 4, "stop_metric": "same/exact_match"}
    config["optimizer"]["learning_rate"] = 3e-3  # at 1e-2 the loss still jumps up and down
    run = jaxtune.train(config, tmp_path / "run")
    (scores,) = run.evaluations()
    tokens = scores["same/tokens"] + scores["other/tokens"]
    assert scores["tokens"] == tokens
    total = sum(scores[f"{s}/loss"] * scores[f"{s}/tokens"] for s in ("same", "other"))
    assert scores["loss"] == pytest.approx(total / tokens)
    assert scores["perplexity"] == pytest.approx(np.exp(scores["loss"]))
    assert scores["same/loss"] < scores["other/loss"]
    samples = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    assert [sample["set"] for sample in samples] == ["same"] * 4 + ["other"] * 4
    assert [sample["expected"] for sample in samples[:4]] == ["aa", "bb", "cc", "dd"]
    assert all(sample["prompt"].endswith("assistant\n") for sample in samples)
    rate = sum(sample["answer"] == sample["expected"] for sample in samples[:4]) / 4
    assert scores["same/exact_match"] == rate > 0
    chats = [[{"role": "user", "content": f"{letter}{i}"}] for i, letter in enumerate("abcd")]
    answers = run.model("best").generate(chats, max_new_tokens=4)
    assert [sample["answer"] for sample in samples[:4]] == [answer.strip() for answer in answers]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_over_fitting_run_stops_and_keeps_its_best(method, tiny_chat, tmp_path, caplog):
    """Letters that are never seen: the held-out loss falls with the format and then rises."""
    train = write(tmp_path / "train.jsonl", "ab", 4)
    held_out = write(tmp_path / "held_out.jsonl", "xyz", 6)
    config = sections(tiny_chat, train, held_out, adapter={"method": method, "rank": 8})
    config["optimizer"]["learning_rate"] = 1e-2 if method == "lora" else 2e-3
    config["training"]["steps"] = 400
    config["evaluation"] |= {"stop_patience": 3, "every": 2}
    with caplog.at_level("INFO"):
        run = jaxtune.train(config, tmp_path / "run")
    evaluations = run.evaluations()
    losses = [line["loss"] for line in evaluations]
    best = int(np.argmin(losses))
    assert len(losses) == best + 1 + 3 and evaluations[-1]["step"] < 400
    assert run.directory.steps_done() == evaluations[-1]["step"]
    step = evaluations[best]["step"]
    assert f"best held-out loss: {losses[best]:.4f} after step {step}" in caplog.text
    from jaxtune.api.evaluate_run import evaluate

    assert evaluate(run.directory, "best")["loss"] == pytest.approx(losses[best], rel=1e-6)
    assert evaluate(run.directory, "last")["loss"] == pytest.approx(losses[-1], rel=1e-6)
    lines = (run.path / "metrics.jsonl").read_text()
    jaxtune.train(None, run.path)  # it has stopped for good
    assert (run.path / "metrics.jsonl").read_text() == lines


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation": {"stop_metric": "los"}}, 'stop_metric="los" is not a metric'),
        ({"data": {"eval": ""}, "evaluation": {"stop_patience": 2}}, "nothing is held out"),
        ({"evaluation": {"stop_patience": 2, "every": 0}}, r"evaluation\.every is 0"),
        ({"logging": {"wandb": "mine"}}, "requires the package wandb, which is not installed"),
        ({"profile": {"steps": "20,10"}}, r"profile\.steps takes the first and last step"),
    ],
)
def test_what_cannot_be_met_is_said_before_the_first_update(changes, message, tiny_chat, tmp_path):
    train = write(tmp_path / "train.jsonl", "ab", 4)
    with pytest.raises(JaxtuneError, match=message):
        jaxtune.train(sections(tiny_chat, train, train, **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
