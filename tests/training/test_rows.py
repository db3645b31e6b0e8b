"""A run shows each row as often as its length says, and says so."""

import collections
import json
import logging
import zlib

import jax
import numpy as np

import jaxtune
from jaxtune.checkpoints import huggingface
from jaxtune.checkpoints.tokenizer import load_tokenizer
from jaxtune.cli import main
from jaxtune.config import load_file, resolve
from jaxtune.training.train import data_reader, make_loader

FLAGS = (
    "training.epochs=2",
    "training.batch_size=3",
    "checkpoint.every=1 epoch",
    "checkpoint.keep=5",
    "evaluation.every=0.5 epochs",
    "optimizer.schedule=linear",
    "logging.tensorboard=false",
)


def digest(batch):
    """A batch as its line in metrics.jsonl has it."""
    checksum = 0
    for leaf in jax.tree.leaves(batch):
        checksum = zlib.crc32(np.asarray(leaf).tobytes(), checksum)
    return f"{checksum:08x}"


def test_two_epochs_show_each_row_twice(small_config, tmp_path, capsys, caplog):
    main(["data", "order", "--config", str(small_config), *(f"--config.{flag}" for flag in FLAGS)])
    order = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    counts = collections.Counter(row for line in order for row in line["rows"])
    assert counts == dict.fromkeys(range(40), 2)
    ends = [max(line["step"] for line in order if line["pass"] == number) for number in (1, 2)]
    assert ends[1] == len(order)
    assert [len(line["rows"]) for line in order[-2:]] == [6, 4]  # the last row of a batch is empty

    caplog.set_level(logging.INFO, logger="jaxtune")
    config = resolve(load_file(small_config), list(FLAGS))
    run = jaxtune.train(config, tmp_path / "run")
    assert f"training for {ends[1]} steps: 2 passes over 40 rows" in caplog.messages
    metrics = run.metrics()
    assert [line["step"] for line in metrics] == [line["step"] for line in order]
    shown = np.cumsum([len(line["rows"]) for line in order])
    assert [line["rows"] for line in metrics] == shown.tolist()
    # What was trained on is what was printed: batches are told apart by all that is in them.
    location = huggingface.resolve_path(config.model.path, None)
    reader = data_reader(config, huggingface.open_source(location), load_tokenizer(location))
    loader = make_loader(config, reader.splits().train)
    assert [line["batch"] for line in metrics] == [digest(next(loader)) for _ in order]
    # The schedule and the intervals follow the same count.
    rates = [line["learning_rate"] for line in metrics]
    expected = config.optimizer.learning_rate * (1 - np.arange(len(order)) / len(order))
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
    halves = [-(-ends[0] // 2), ends[0], ends[0] + -(-(ends[1] - ends[0]) // 2), ends[1]]
    assert [line["step"] for line in run.evaluations()] == halves
    saved = sorted(int(path.name) for path in run.directory.checkpoints.glob("[0-9]*"))
    assert saved == ends
