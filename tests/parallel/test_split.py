"""The split of a batch: micro-batches, padding, and what is derived from the devices."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import jaxtune
from jaxtune.config import from_json, resolve
from jaxtune.config.length import divisors_of
from jaxtune.parallel.devices import CPU_BYTES, GIB, GPUS, TPUS, DeviceGroup, chip_of_kind
from jaxtune.planning.topology import find_topology
from jaxtune.runs.changes import resumed_config
from jaxtune.training.placement.split import BatchSplit, fewest_micro_batches, pad_rows
from jaxtune.training.setup import set_up
from jaxtune.training.train import choose_method

LLAMA = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
SPLITS = [(rows, shares) for rows in range(1, 41) for shares in (1, 2, 3, 4, 8, 32)]


def start(config, devices, memory=CPU_BYTES, kind="cpu"):
    """Sets a run up on described devices."""
    method, _ = choose_method(config.adapter)
    return set_up(config, LLAMA, method, DeviceGroup(devices, kind, "cpu", memory))


def test_no_micro_batches_add_padding_and_no_row_is_lost():
    for rows, shares in SPLITS:
        fewest = BatchSplit(rows, shares, 1)
        assert fewest.padded_rows == -(-rows // shares) * shares
        for most in range(1, fewest.rows_per_device + 1):
            count = fewest_micro_batches(rows, shares, lambda each, most=most: each <= most)
            split = BatchSplit(rows, shares, count)
            assert split.rows_per_device <= most, "what fits"
            assert split.padded_rows == fewest.padded_rows
            fewer = [n for n in range(1, count) if fewest.rows_per_device % n == 0]
            assert all(fewest.rows_per_device // n > most for n in fewer), "the fewest that fit"
        # A row at a time if nothing fits.
        assert fewest_micro_batches(rows, shares, lambda each: False) == fewest.rows_per_device


def test_the_warning_names_batch_sizes_without_padding():
    for rows, shares in SPLITS:
        for count in (n for n in range(1, rows + 1) if rows % n == 0):
            split = BatchSplit(rows, shares, count)
            warning = split.warning()
            assert bool(warning) == (split.padded_rows > rows)
            if warning:
                assert f"training.batch_size={rows} does not fill {shares} devices" in warning
                sizes = warning.rpartition("training.batch_size=")[2].removesuffix(" has none")
                for size in map(int, sizes.split(" or ")):
                    assert not BatchSplit(size, shares, count).warning()


def test_other_batches_are_cut_into_pieces_of_one_shape():
    for rows, shares in SPLITS:
        for training in (BatchSplit(8, shares, 1), BatchSplit(8, shares, 4)):
            count, each = training.pieces(rows)
            assert each % shares == 0 and each <= training.micro_rows
            assert (count - 1) * each < rows <= count * each, "no piece is all padding"


def test_empty_rows_have_no_segment_and_no_target():
    batch = {name: np.full((3, 4), 7, np.int32) for name in ("tokens", "targets", "segment_ids")}
    padded = pad_rows(batch, 5)
    for name, array in padded.items():
        assert (array[:3] == 7).all() and array.dtype == np.int32
        assert (array[3:] == (-100 if name == "targets" else 0)).all()
    assert pad_rows(batch, 3)["tokens"] is batch["tokens"]


def test_less_memory_takes_more_micro_batches_of_the_same_batch():
    config = resolve({"training": {"batch_size": 16}, "data": {"max_length": 1024}})
    enough = start(config, 2)
    needed = enough.temporaries()
    counts = [start(config, 2, memory=int(needed * share)).split for share in (2, 0.9, 0.6, 0.1)]
    assert [split.accumulation for split in counts] == sorted(s.accumulation for s in counts)
    assert counts[0].accumulation == 1 and counts[-1].accumulation == 8
    assert {split.padded_rows for split in counts} == {16}
    # What is set is not changed, whatever the memory.
    set_to_two = resolve({"training": {"batch_size": 16, "accumulation": 2}})
    assert start(set_to_two, 2, memory=1).split.accumulation == 2


def test_a_fitted_config_is_stored_with_what_was_requested(tmp_path):
    config = resolve({"mesh": {"fsdp": 4}, "training": {"batch_size": 8}})
    fitted = start(config, 2).config
    assert (fitted.mesh.data, fitted.mesh.fsdp, fitted.training.accumulation) == (1, 2, 1)
    (tmp_path / "config.json").write_text(fitted.to_json())
    stored = from_json(tmp_path / "config.json")
    assert stored == fitted and stored.derived == fitted.derived
    assert stored.requested() == config and resolve(stored) == config
    assert stored.derived is not None
    assert stored.derived.requested == {
        "training.accumulation": 0,
        "mesh.data": -1,
        "mesh.fsdp": 4,
    }


def test_a_resume_repeats_what_was_derived_or_derives_it_again():
    config = resolve({"mesh": {"fsdp": 4}, "training": {"batch_size": 8}})
    fitted = start(config, 2).config
    # Not even another derivation, such as that of a later version, changes a run on its devices.
    other = dataclasses.replace(fitted.training, accumulation=4)
    kept = dataclasses.replace(fitted, training=other)
    again = start(kept, 2)
    assert again.split.accumulation == 4 and not again.notes
    for devices, kind in ((8, "cpu"), (2, "TPU v4")):
        moved = start(kept, devices, kind=kind)
        assert moved.config.requested() == config
        assert moved.split.accumulation == 1 and moved.config.mesh.fsdp == min(4, devices)
        assert f"fitted to 2 × cpu and continues on {devices} × {kind}" in moved.notes[0]


def test_sizes_on_the_command_line_are_kept_and_those_of_a_config_shrink():
    tree = {"mesh": {"fsdp": 8}, "training": {"batch_size": 8}}
    shrunk = start(resolve(tree), 4)
    assert shrunk.config.mesh.fsdp == 4 and "mesh.fsdp: 8 → 4" in shrunk.notes[0]
    with pytest.raises(jaxtune.JaxtuneError, match=r"mesh.fsdp=8 cannot be used with 4 device"):
        start(resolve(tree, ["mesh.fsdp=8"]), 4)
    kept = start(resolve(tree, ["mesh.fsdp=2"]), 4).config.mesh
    assert (kept.data, kept.fsdp) == (2, 2)


def test_a_size_on_the_command_line_is_kept_or_refused_on_a_resume():
    tree = {"mesh": {"fsdp": 8}, "training": {"batch_size": 8}}
    frozen = start(resolve(tree), 4).config

    def resume(*overrides):
        return start(resumed_config(Path("run"), frozen, resolve(tree, overrides)), 4).config

    for kept in (resume(), resume("logging.every=3")):
        assert kept.mesh.fsdp == 4 and kept.derived == frozen.derived
    with pytest.raises(jaxtune.JaxtuneError, match=r"mesh.fsdp=8 cannot be used with 4 device"):
        resume("mesh.fsdp=8")
    assert (resume("mesh.fsdp=2").mesh.data, resume("mesh.fsdp=2").mesh.fsdp) == (2, 2)


def test_a_changed_value_of_a_fitted_config_leaves_the_others_as_requested():
    config = resolve({"mesh": {"fsdp": 4}, "training": {"batch_size": 8}})
    fitted = start(config, 2).config
    assert fitted.replace(mesh={"fsdp": 8}) == config.replace(mesh={"fsdp": 8})
    assert fitted.replace(mesh={"fsdp": 8}).derived is None
    longer = fitted.replace(training={"steps": 7})
    assert longer.derived == fitted.derived and longer.mesh == fitted.mesh


def test_a_run_records_its_devices(tiny, tmp_path):
    rows = [{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}] * 3
    (tmp_path / "rows.jsonl").write_text("".join(f"{row}\n".replace("'", '"') for row in rows))
    sections = {
        "model": {"path": str(tiny("llama"))},
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 8, "packing": False},
        "training": {"steps": 1, "batch_size": 3},
        "logging": {"tensorboard": False},
    }
    run = jaxtune.train(sections, tmp_path / "run")
    derived = run.config.derived
    assert derived is not None and derived.devices == 1 and run.config.training.accumulation == 1
    before = (tmp_path / "run" / "config.json").read_bytes()
    jaxtune.train(sections, tmp_path / "run")  # the same config resumes it
    assert (tmp_path / "run" / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    "kind, name",
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GH200 480GB", None),  # with 96 or 144 GB
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA A100-PCIE-40GB", "a100-40g"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 3080", "rtx3080"),  # there is one with more memory
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),  # with 16 GB
        ("cpu", None),
    ],
)
def test_devices_are_known_by_the_names_of_jax(kind, name):
    assert chip_of_kind(kind) == (None if name is None else (TPUS | GPUS)[name])


@pytest.mark.parametrize(
    "kind, topology, share",
    [
        ("NVIDIA GeForce RTX 4090", "rtx4090", 0.75),  # compiled as another chip, if at all
        ("NVIDIA H100 80GB HBM3", "h100:2", 0.75),
        ("AMD Instinct MI300X", "mi300x", 0.75),  # has no compiler
        ("TPU v5 lite", "v5e:1x1", 1),
    ],
)
def test_a_run_and_its_plan_have_the_same_memory(kind, topology, share):
    """Of a GPU it is what JAX's allocator takes, by whatever compiler the GPU is described."""
    running = DeviceGroup.of([SimpleNamespace(device_kind=kind, platform="gpu")])
    planned = find_topology(topology)
    assert running.memory == planned.group.memory == int(planned.capacity_bytes * share)


def test_an_unknown_gpu_has_the_memory_of_its_allocator():
    device = SimpleNamespace(
        device_kind="NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        platform="gpu",
        process_index=0,
        memory_stats=lambda: {"bytes_limit": 7 * GIB + 1},
    )
    assert DeviceGroup.of([device]).memory == 7 * GIB


def test_divisors_of_a_large_number_take_no_time():
    for number in (1, 2, 36, 97, 360):
        assert divisors_of(number) == [n for n in range(1, number + 1) if number % n == 0]
    assert len(divisors_of(10**12)) == 169
