"""Merging into quantized weights: the result, the report, and unchanged weights."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtune
from jaxtune.adapter_files.peft import write_adapter
from jaxtune.adapters import method_from_peft
from jaxtune.adapters.esft.esft import Esft
from jaxtune.adapters.projections.bitfit import BitFit
from jaxtune.adapters.projections.dora import Dora
from jaxtune.adapters.projections.ia3 import IA3
from jaxtune.adapters.projections.lora import Lora
from jaxtune.adapters.projections.pissa import Pissa
from jaxtune.adapters.projections.vera import Vera
from jaxtune.api import Model
from jaxtune.api.evaluate_run import evaluate
from jaxtune.checkpoints import huggingface
from jaxtune.checkpoints.load_model import load_model
from jaxtune.checkpoints.merging import merge_adapter
from jaxtune.checkpoints.requantize import REPORT
from jaxtune.cli import main
from jaxtune.config import resolve
from jaxtune.layers.tree import flatten, layer_names, unflatten
from jaxtune.parallel.mesh import single_device_mesh
from jaxtune.quant import QuantizedWeight, quantization_from_config
from jaxtune.runs.directory import RunDirectory

TOKENS = np.random.default_rng(1).integers(3, 160, (2, 12))
MOE = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 20,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 16,
    "v_head_dim": 10,
}
# The middle layer is left alone, and the head is a plain weight that is edited.
SOME = (r"model\.layers\.[02]\..*(q_proj|down_proj)", "lm_head")
METHODS = {
    "lora": Lora(4, 8.0, targets=SOME),
    "dora": Dora(4, 8.0, targets=SOME),
    "pissa": Pissa(4, 8.0, targets=SOME[:1]),
    "vera": Vera(24, targets=SOME),
    "ia3": IA3(("k_proj", "down_proj"), ("down_proj",)),
    "bitfit": BitFit(("o_proj",)),
    "esft": Esft(experts=((1, (0, 3)),)),
}
QUICK = {("lora", "nf4")}
CASES = [
    pytest.param(method, form, marks=() if (method, form) in QUICK else pytest.mark.slow)
    for method in METHODS
    for form in ("", "nf4", "int4", "int8", "fp8")
    if form in ("", "nf4") or method in ("lora", "ia3")
]


def checkpoint(tiny, method):
    if method == "esft":
        return tiny("deepseek_v3", **MOE)
    return tiny("qwen2" if method == "bitfit" else "llama")


def open_model(directory, method, form):
    """A float32 model over a base of this format whose trained arrays have moved."""
    section = resolve({"quantize": {"format": form}}).quantize
    quantization = quantization_from_config(section)
    source, mesh = huggingface.open_source(directory), single_device_mesh()
    options = {"method": method, "quantization": quantization, "progress": False}
    parts = load_model(source, "float32", mesh, **options)
    leaves = dict(flatten(parts.trainable))
    keys = jax.random.split(jax.random.key(3), len(leaves))
    moved = {
        path: value + 0.1 * jax.random.normal(key, value.shape)
        for (path, value), key in zip(leaves.items(), keys, strict=True)
    }
    return Model(parts._replace(trainable=unflatten(moved)), directory, mesh, dtype="float32")


def streamed(model, directory, target, form, *, quantized):
    """The same merge as `Model.save_pretrained`, from the checkpoint and the stored adapter."""
    method, source = model.method, huggingface.open_source(directory)
    stored = method.store(model.definition, model.trainable, model.constants)
    method = method.with_stored(stored) if method.edits_base else method_from_peft(stored)
    quantization = quantization_from_config(resolve({"quantize": {"format": form}}).quantize)
    merge = merge_adapter(source, "float32", method, stored, quantization)
    return huggingface.convert(
        target,
        merge.definition,
        merge.source,
        edits=merge.edits,
        quantized=quantized,
        original=merge.original,
        progress=False,
    )


def assert_equal_weights(ours, theirs):
    for name in (
        "model.safetensors",
        "config.json",
        *([REPORT] if (theirs / REPORT).exists() else []),
    ):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def as_bytes(tree):
    return {
        path: [np.asarray(part).tobytes() for part in jax.tree.leaves(leaf)]
        for path, leaf in flatten(tree)
    }


def weights(model):
    """Every quantized weight [out, in] by its name."""
    found = {}
    for path, leaf in flatten(model.base):
        if isinstance(leaf, QuantizedWeight):
            declared = model.definition.leaves[path].declaration
            for part, name in enumerate(layer_names(path, declared)):
                place = np.unravel_index(part, declared.stack_shape)
                found[name] = jax.tree.map(lambda value, place=place: value[place], leaf)
    return found


@pytest.mark.parametrize(("name", "form"), CASES)
def test_merged_weights_are_written_and_the_base_is_unchanged(name, form, tiny, tmp_path):
    directory = checkpoint(tiny, name)
    model = open_model(directory, METHODS[name], form)
    before = as_bytes(model.base)
    # The merged weights in float32 are held against the edits themselves elsewhere.
    wide = model.save_pretrained(tmp_path / "wide", "float32")
    assert_equal_weights(
        streamed(model, directory, tmp_path / "streamed", form, quantized=False), wide
    )
    exact = jaxtune.load(wide, dtype="float32", progress=False).logits(TOKENS)
    assert np.abs(exact - model.logits(TOKENS)).max() <= 2e-5 * np.abs(exact).max()
    if form:
        written = model.save_pretrained(tmp_path / "merged", quantized=True)
        assert_equal_weights(
            streamed(model, directory, tmp_path / "streamed-q", form, quantized=True), written
        )
        merged = jaxtune.load(written, None, form, "float32", progress=False)
        report = json.loads((written / REPORT).read_text())
        edited = {row["name"] for row in report["weights"]}
        old, new = weights(model), weights(merged)
        assert new.keys() == old.keys()
        assert bool(edited) == (name != "bitfit") and edited < set(new)
        original, exact = huggingface.open_source(directory), huggingface.open_source(wide)
        for weight, parts in new.items():
            expected = old[weight]
            if weight in edited:
                frozen = np.asarray(expected.dequantize(jnp.float32))
                value = exact.read(weight)
                if name != "pissa":  # whose base was not quantized from the checkpoint
                    value = original.read(weight) + (value - frozen)
                encoded = jax.tree.map(np.asarray, jax.jit(parts.format.encode)(value))
                expected = dataclasses.replace(parts, parts=parts.format.finish(encoded))
            assert as_bytes(parts.parts) == as_bytes(expected.parts), weight
    assert as_bytes(model.base) == before


def squares(value):
    return np.sum(np.asarray(value, np.float64) ** 2)


@pytest.mark.parametrize(
    "form", ["nf4", *(pytest.param(f, marks=pytest.mark.slow) for f in ("int4", "int8", "fp8"))]
)
def test_the_report_agrees_with_the_files(form, tiny, tmp_path):
    """Every number from tensors on disk, in float64."""
    directory = tiny("llama")
    model = open_model(directory, METHODS["lora"], form)
    written = model.save_pretrained(tmp_path / "merged", quantized=True)
    report = json.loads((written / REPORT).read_text())
    wide = model.save_pretrained(tmp_path / "wide", "float32")
    base = jaxtune.convert(directory, tmp_path / "base", form, "float32", progress=False)
    files = {"W": directory, "W_q": base, "M": wide, "Q": written}
    sources = {key: huggingface.open_source(path) for key, path in files.items()}
    assert report["format"] == form and len(report["weights"]) == 4
    terms = []
    for row in report["weights"]:
        read = {key: source.read(row["name"]) for key, source in sources.items()}
        W, W_q, M, Q = (read[key].astype(np.float64) for key in files)
        edit = M - W_q
        values = Q - (W + edit), W + edit, W_q - W, W, edit, W_q
        terms.append([*map(squares, values), np.sum((Q - W_q) * edit)])
        assert_measures(row, terms[-1])
    assert_measures(report["all"], np.sum(terms, axis=0))


def assert_measures(row, terms):
    error, merged, base_error, original, edit, frozen, along = terms
    expected = {
        "error": np.sqrt(error / merged),
        "base_error": np.sqrt(base_error / original),
        "edit": np.sqrt(edit / frozen),
        "kept": along / edit,
    }
    # Both sides add float32 products; the edit is a difference of values 10 times as large.
    for key, value in expected.items():
        assert row[key] == pytest.approx(value, rel=1e-4), (key, row)


def test_a_small_edit_survives_if_added_to_the_checkpoint_but_not_to_the_rounded_base(
    tiny, tmp_path, caplog
):
    """An edit of a hundredth of a weight is far less than a step of 4 bits."""
    directory = tiny("llama")
    rounded = jaxtune.convert(directory, tmp_path / "base", "nf4", "float32", progress=False)
    reports = {}
    for name, base in {"checkpoint": directory, "rounded": rounded}.items():
        model = open_model(base, METHODS["lora"], "nf4")
        model.trainable = jax.tree.map(lambda value: value * 0.05, model.trainable)
        caplog.clear()
        written = model.save_pretrained(tmp_path / name, quantized=True)
        reports[name] = json.loads((written / REPORT).read_text())["all"]
        assert ("is left after rounding to nf4" in caplog.text) == (name == "rounded")
    assert all(report["edit"] < 0.01 for report in reports.values())
    assert reports["checkpoint"]["kept"] == pytest.approx(1, abs=0.3)
    assert reports["rounded"]["kept"] < 0.5 and reports["rounded"]["base_error"] is None


def test_unloading_leaves_the_base_as_it_was(tiny, tmp_path):
    directory = tiny("llama")
    model = open_model(directory, METHODS["lora"], "nf4")
    stored = model.method.store(model.definition, model.trainable, model.constants)
    adapter = write_adapter(tmp_path / "adapter", stored)
    named = jaxtune.load(
        directory, quantize="nf4", adapters={"a": adapter}, dtype="float32", progress=False
    )
    before, logits = as_bytes(named.base), np.asarray(named.logits(TOKENS))
    assert np.abs(named.use("a").logits(TOKENS) - logits).max() > 1e-3
    named.save_pretrained(tmp_path / "merged", quantized=True)
    assert as_bytes(named.use(None).base) == before
    assert np.array_equal(named.logits(TOKENS), logits)
    with pytest.raises(jaxtune.JaxtuneError, match='option="densty" is unknown; did you mean "den'):
        named.use("a", densty=0.5)


def test_a_value_that_is_not_finite_is_named_and_nothing_is_written(tiny, tmp_path):
    model = open_model(tiny("llama"), METHODS["lora"], "nf4")
    model.trainable = jax.tree.map(lambda value: value * np.inf, model.trainable)
    with pytest.raises(jaxtune.JaxtuneError, match=r"merged weights: \S+proj\.weight: .* NaN or"):
        model.save_pretrained(tmp_path / "merged", quantized=True)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"quantize\.format is empty: the base is not quantized"),
        (
            {"adapter": {"method": "ptuning"}},
            r"=ptuning cannot be merged.* --format peft writes PE",
        ),
        ({"adapter": {"method": "bottleneck"}}, r"--format peft writes AdapterHub's"),
    ],
    ids=["plain", "virtual tokens", "bottleneck"],
)
def test_methods_that_cannot_merge_are_rejected_before_loading(settings, message, tmp_path):
    with RunDirectory(tmp_path / "run").start(resolve(settings)):
        pass
    with pytest.raises(jaxtune.JaxtuneError, match=message):
        jaxtune.Run(tmp_path / "run").save_merged(tmp_path / "merged", quantized=True)


@pytest.mark.parametrize("form", ["nf4"])
def test_a_run_is_exported_quantized_with_its_losses(form, tiny_chat, tmp_path, capsys):
    rows = [
        {"prompt": f"Count from {i}.", "completion": " ".join(map(str, range(i, i + 4)))}
        for i in range(6)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": {"path": str(tiny_chat)},
        "data": {"train": str(data), "eval": str(data), "overlap": "keep", "max_length": 48},
        "adapter": {"method": "lora", "rank": 4, "targets": "q_proj,down_proj"},
        "quantize": {"format": form},
        "training": {"steps": 4, "batch_size": 2, "dtype": "float32"},
        "optimizer": {"learning_rate": 0.02},
        "evaluation": {"every": 4},
        "logging": {"tensorboard": False},
    }
    run, target = jaxtune.train(config, tmp_path / "run"), tmp_path / "merged"
    command = ["export", "--workdir", str(run.path), "--format", "merged", "--quantized"]
    main([*command, "--to", str(target)])
    report, printed = json.loads((target / REPORT).read_text()), capsys.readouterr().out
    beside = ("tokenizer.json", "chat_template.jinja", "generation_config.json")
    assert all((target / name).is_file() for name in beside)
    losses = report["loss"]
    assert losses["with_adapter"] == pytest.approx(run.evaluations()[-1]["loss"], rel=1e-6)
    # The same weights, but for the order of a sum.
    assert losses["merged"] == pytest.approx(losses["with_adapter"], rel=1e-5)
    assert losses["merged_quantized"] != pytest.approx(losses["merged"], rel=1e-4)
    # As a run that starts from the written checkpoint sees it.
    other = RunDirectory(tmp_path / "other")
    with other.start(resolve(config | {"model": {"path": str(target)}})):
        scores = evaluate(other, "none")
    assert scores["loss"] == pytest.approx(losses["merged_quantized"], rel=1e-6)
    assert "all" in printed and f"{losses['merged_quantized']:.4f}" in printed
    with pytest.raises(SystemExit):
        main([*command[:4], "peft", "--quantized", "--to", str(tmp_path / "peft")])
    assert "--quantized requires --format merged" in capsys.readouterr().err
