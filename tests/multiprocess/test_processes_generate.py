"""Two processes answer held-out prompts as one does."""

import json

import jaxtune


def test_answers_are_those_of_one_process(start, tmp_path):
    flags = ("--config.training.steps=2", "--config.evaluation.generate=3")
    start(2, tmp_path / "run", *flags, "--config.evaluation.every=2").succeed()
    run = jaxtune.Run(tmp_path / "run")
    samples = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    chats = [[{"role": "user", "content": f"{letter}{i}"}] for i, letter in enumerate("abc")]
    # One token more than the longest answer, "ccc" and its end.
    answers = run.model("last").generate(chats, 5)
    assert [sample["answer"] for sample in samples] == [answer.strip() for answer in answers]
    assert len(set(answers)) > 1 and all(answers)
