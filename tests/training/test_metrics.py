import json
import random
import struct
import tracemalloc

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from jaxtune.errors import JaxtuneError
from jaxtune.runs.metrics import MetricLog, missing_steps, read_lines


def read_events(directory):
    """Reads event files: records of length, checksum, protocol buffer, checksum."""
    for file in sorted((directory / "tensorboard").iterdir()):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack_from("<Q", content)
            yield event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[12 + length + 4 :]


def write(directory, steps, resume_step=0, tensorboard=False):
    with MetricLog(directory, tensorboard, resume_step) as log:
        for step in steps:
            log.train(step, {"loss": 1 / step, "tokens": 10 * step})
            if step % 2 == 0:
                log.evaluation(step, {"loss": 2 / step})


def test_lines_hold_what_was_logged(tmp_path):
    write(tmp_path, [1, 2])
    assert read_lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 1.0, "tokens": 10},
        {"step": 2, "loss": 0.5, "tokens": 20},
    ]
    assert read_lines(tmp_path / "evaluations.jsonl") == [{"step": 2, "loss": 1.0}]


def test_a_line_is_on_disk_when_the_call_returns(tmp_path):
    with MetricLog(tmp_path, tensorboard=False, resume_step=0) as log:
        log.train(1, {"loss": 1.0})
        assert len(read_lines(tmp_path / "metrics.jsonl")) == 1


def test_float32_survives_bitwise(tmp_path):
    bits = np.random.default_rng(0).integers(0, 0x7F800000, 1000, dtype=np.uint32)
    losses = bits.view(np.float32)  # every finite positive float32, subnormal ones too
    with MetricLog(tmp_path, tensorboard=False, resume_step=0) as log:
        for step, loss in enumerate(losses, start=1):
            log.train(step, {"loss": float(loss)})
    again = [line["loss"] for line in read_lines(tmp_path / "metrics.jsonl")]
    np.testing.assert_array_equal(np.asarray(again, np.float32).view(np.uint32), bits)


def test_resuming_drops_later_lines_and_gives_the_file_of_an_unbroken_run(tmp_path):
    for name, parts in {
        "unbroken": [(0, [1, 2, 3, 4, 5])],
        "broken": [(0, [1, 2, 3, 4]), (2, [3, 4, 5])],
    }.items():
        (tmp_path / name).mkdir()
        for resume_step, steps in parts:
            write(tmp_path / name, steps, resume_step)
    for file in ("metrics.jsonl", "evaluations.jsonl"):
        unbroken, broken = ((tmp_path / name / file).read_text() for name in ("unbroken", "broken"))
        assert unbroken == broken


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3}', "\udcff"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    write(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a", errors="surrogateescape") as file:
        file.write(torn)
    write(tmp_path, [3], resume_step=3)
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


NAN, DEEP = '{"step": 1, "loss": NaN}', "[" * 100_000


@pytest.mark.parametrize(
    "line", ["{", "[]", "{}", '{"step": null}', "3", NAN, DEEP], ids=lambda line: line[:20]
)
def test_another_broken_line_is_named_and_the_file_kept(tmp_path, line):
    write(tmp_path, [1])
    path = tmp_path / "metrics.jsonl"
    path.write_text(text := path.read_text() + line + "\n" + path.read_text())
    with pytest.raises(JaxtuneError, match=r"metrics\.jsonl:2: .*; fix or remove the line"):
        write(tmp_path, [2], resume_step=1)
    assert path.read_text() == text


def test_a_value_that_json_lacks_is_refused(tmp_path):
    with MetricLog(tmp_path, tensorboard=False, resume_step=0) as log, pytest.raises(ValueError):
        log.train(1, {"loss": float("nan")})
    assert read_lines(tmp_path / "metrics.jsonl") == []


def test_events_hold_the_same_values_and_mark_where_a_run_went_on(tmp_path):
    write(tmp_path, [1, 2, 3, 4], tensorboard=True)
    first = list(read_events(tmp_path))
    losses = [
        (event.step, value.simple_value)
        for event in first
        for value in event.summary.value
        if value.tag == "train/loss"
    ]
    assert losses == [(step, np.float32(1 / step)) for step in (1, 2, 3, 4)]
    assert not [event for event in first if event.HasField("session_log")]
    write(tmp_path, [3], resume_step=2, tensorboard=True)
    marks = [event for event in read_events(tmp_path) if event.HasField("session_log")]
    assert [(m.step, m.session_log.status) for m in marks] == [(3, event_pb2.SessionLog.START)]


def test_lost_steps_are_those_that_no_range_has():
    draw = random.Random(20261129)
    for _ in range(200):
        stored, found = (
            [
                [first := draw.randrange(40), first + draw.randrange(30), draw.randrange(1, 5)]
                for _ in range(draw.randrange(4))
            ]
            for _ in range(2)
        )
        sets = [
            {step for first, last, by in ranges for step in range(first, last + 1, by)}
            for ranges in (stored, found)
        ]
        assert [*missing_steps(stored, found)] == sorted(sets[0] - sets[1]), (stored, found)
    damaged = [[1, 2], "x", [1, 5, 0], [5, 1, 1], [-4, 1, 1], None, [1.5, 2, 1]]
    assert [*missing_steps([*damaged, [3, 4, 1]], [])] == [3, 4]
    for stored in (damaged, [[0, 10**15, 1]], {"a": 1}, None, 5):
        assert not len(missing_steps(stored, []))


def test_long_ranges_of_steps_are_compared_without_expanding_them():
    tracemalloc.start()
    try:
        assert [*missing_steps([[1, 10**7, 1]], [[1, 10**7 - 2, 1]])] == [10**7 - 1, 10**7]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3e7


def test_events_are_optional(tmp_path):
    write(tmp_path, [1])
    assert not (tmp_path / "tensorboard").exists()
    write(tmp_path, [2], resume_step=1, tensorboard=True)
    assert any((tmp_path / "tensorboard").iterdir())
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])["step"] == 2


def test_resuming_keeps_the_text_of_earlier_lines(tmp_path):
    with MetricLog(tmp_path, tensorboard=False, resume_step=0) as log:
        for step in (1, 2):
            log.samples(step, [{"prompt": "你好", "answer": "é"}])
    path = tmp_path / "samples.jsonl"
    first = path.read_text().splitlines(keepends=True)[0]
    write(tmp_path, [2], resume_step=1)
    assert path.read_text() == first and "你好" in first
