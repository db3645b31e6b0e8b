"""Scores of one's own: registered once, for evaluations, early stopping and the command line."""

import json

import jax
import numpy as np
import pytest

import jaxtune
from jaxtune.api.run import Run
from jaxtune.cli import main
from jaxtune.errors import JaxtuneError
from jaxtune.training import scores
from jaxtune.training.loop.early_stopping import check_metric


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Removes what a test registers."""
    monkeypatch.setattr(scores, "SCORES", dict(scores.SCORES))


def test_a_score_of_a_config_file_selects_the_best_and_is_printed(
    small_config, tmp_path, capsys, monkeypatch
):
    path = tmp_path / "scored.py"
    own = 'jaxtune.register_score("{}", lambda a, e: abs(len(a) - {}), higher_is_better=False)\n'
    own = "".join(own.format(name, n) for name, n in (("near_3", 3), ("near_5", 5)))
    path.write_text(f"import jaxtune\n\n{own}\n\n{small_config.read_text()}")
    settings = {"training.steps": 4, "evaluation.every": 2, "evaluation.generate": 3}
    settings |= {"evaluation.stop_metric": "near_3", "logging.tensorboard": "false"}
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    main(["train", "--config", str(path), "--workdir", str(tmp_path / "run"), *overrides])
    run = Run(tmp_path / "run")
    samples = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    for line in run.evaluations():
        own = [s for s in samples if s["step"] == line["step"]]
        for size in (3, 5):
            rated = [abs(len(s["answer"]) - size) for s in own]
            assert line[f"near_{size}"] == pytest.approx(sum(rated) / 3)
            assert [s[f"near_{size}"] for s in own] == rated
    best = min(run.evaluations(), key=lambda line: line["near_3"])
    monkeypatch.setattr(scores, "SCORES", {k: v for k, v in scores.SCORES.items() if k != "near_3"})
    capsys.readouterr()
    main(["eval", "--workdir", str(run.path), "--scores", str(path)])
    printed = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert float(printed["near_3"]) == pytest.approx(best["near_3"], abs=5e-4)
    assert {"near_5", "exact_match"} <= printed.keys()
    (tmp_path / "none.py").write_text("")
    for arguments, message in (
        (["--scores", str(path), "--generate", "0"], "generates none: give the number of prompts"),
        (["--scores", str(tmp_path / "none.py")], "registers no score"),
        (["--generate", "-1"], "--generate=-1 is not a number of prompts"),
    ):
        with pytest.raises(SystemExit):
            main(["eval", "--workdir", str(run.path), *arguments])
        assert message in capsys.readouterr().err


def test_a_name_that_cannot_be_used_is_refused():
    for name, message in {
        "loss": "built-in name",
        "answer": "built-in name",
        "experts_unused": "built-in name",
        "law/f1": "not a name of a score",
    }.items():
        with pytest.raises(JaxtuneError, match=message):
            jaxtune.register_score(name, lambda answer, expected: 1.0)
    jaxtune.register_score("f1", lambda answer, expected: 1.0)
    jaxtune.register_score("f1", lambda answer, expected: len(answer))  # as a notebook does
    assert scores.rate_answer("abc", "") == {"exact_match": 0.0, "f1": 3.0}
    for value in (np.float32(0.5), np.bool_(True), np.int64(2), jax.numpy.float32(3)):
        jaxtune.register_score("f1", lambda answer, expected, value=value: value)
        assert scores.rate_answer("abc", "")["f1"] == value
    for value in (None, "1", float("nan"), np.float32("inf"), 10**400, [1.0]):
        jaxtune.register_score("f1", lambda answer, expected, value=value: value)
        with pytest.raises(JaxtuneError, match=r'the score "f1" is .* for an answer'):
            scores.rate_answer("abc", "")
    jaxtune.register_score("f1", lambda answer: 1.0)
    with pytest.raises(JaxtuneError, match='the score "f1" failed for an answer: TypeError: '):
        scores.rate_answer("abc", "")


def test_a_score_that_is_not_registered_is_explained():
    with pytest.raises(JaxtuneError, match=r"jaxtune\.register_score.* adds others"):
        check_metric("contains", ["loss", "exact_match"])
    jaxtune.register_score("contains", lambda answer, expected: expected in answer)
    with pytest.raises(JaxtuneError, match=r"it needs evaluation\.generate"):
        check_metric("contains", ["loss"])
    check_metric("law/contains", ["loss", "law/contains"])
