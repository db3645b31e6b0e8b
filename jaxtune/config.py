"""Every knob of a run, in one typed and explained tree.

A config file is Python with a ``get_config()`` that starts from `default` and changes what it
wants; the command line overrides single keys (``--config.adapter.rank=8``). `resolve` checks the
whole tree and freezes it; the frozen tree is what the run directory stores.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import math
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import ml_collections

from jaxtune.errors import JaxtuneError, closest

# What `resolve` gives: an ml_collections.FrozenConfigDict, whose own types do not know that a
# section has attributes.
Config: TypeAlias = Any


@dataclasses.dataclass(frozen=True)
class Knob:
    """One setting: its default, what it does, and which values it takes."""

    default: Any
    help: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    names: bool = False  # a name, a comma-separated string of names, or a sequence of names


KNOBS: dict[str, dict[str, Knob]] = {
    "model": {
        "path": Knob("", "Hugging Face directory, hub id or .gguf file of the base model"),
        "revision": Knob("", "commit, tag or branch of a hub id; empty: its default branch"),
        "attention": Knob(
            "auto", "attention backend: auto (by platform), xla, blockwise, cudnn or splash"
        ),
    },
    "data": {
        "train": Knob("", "training examples: a JSONL file, or a data set's hub id"),
        "eval": Knob("", "held-out examples; empty: none"),
        "max_length": Knob(1024, "tokens in a row", minimum=2),
        "packing": Knob(True, "first-fit packing of several examples into a row"),
        "shuffle": Knob(True, "a new order in every epoch, a function of training.seed"),
        "too_long": Knob(
            "error",
            "an example over data.max_length: error, drop (counted) or truncate (its end, counted)",
            choices=("error", "drop", "truncate"),
        ),
        "chat_template": Knob(
            "",
            "used in place of the checkpoint's own chat template: a Jinja file, or the name of a "
            "built-in one such as deepseek-v3",
        ),
    },
    "adapter": {
        "method": Knob(
            "lora",
            "what is trained: lora, dora, pissa, vera, ia3, bitfit, prompt, ptuning, prefix, "
            "bottleneck, esft (the routed experts that the data calls on) or full (every weight)",
        ),
        "rank": Knob(16, "rank r of the LoRA factors", minimum=1),
        "alpha": Knob(32.0, "LoRA scale is alpha / rank", minimum=0),
        "rslora": Knob(False, "the scale is alpha / √rank instead, which holds up at high ranks"),
        "dropout": Knob(
            0.0,
            "dropout on LoRA's input, between an LSTM's layers, on what a bottleneck adds",
            minimum=0,
            maximum=0.999,
        ),
        "targets": Knob(
            ("q_proj", "k_proj", "v_proj", "o_proj"),
            "modules to adapt: names, all-linear, or a regular expression of the whole path",
            names=True,
        ),
        "layers": Knob("", "the only layers to adapt, such as 0,4-7; empty: all"),
        "rank_pattern": Knob(
            (), "other ranks, such as up_proj=8; patterns match the end of a path", names=True
        ),
        "alpha_pattern": Knob((), "other alphas, such as up_proj=8", names=True),
        "modules_to_save": Knob(
            (), "modules trained and stored whole beside the adapter, such as lm_head", names=True
        ),
        "new_tokens": Knob(
            0, "how many of the last tokens have their embedding trained", minimum=0
        ),
        "freeze": Knob(
            (),
            "what adapter.method=full leaves as it is: expressions of the beginnings of names, "
            "such as model.embed_tokens,model.layers.[0-3].",
            names=True,
        ),
        "expert_scores": Knob(
            "",
            "what chooses ESFT's experts: a file of jaxtune experts score, or an expert config of "
            "ESFT's authors; empty: a new run scores its training data",
        ),
        "expert_score": Knob(
            "token",
            "ESFT: experts are scored by how many tokens choose them (token) or by the weights "
            "that tokens give them (gate)",
            choices=("token", "gate"),
        ),
        "expert_threshold": Knob(
            0.2,
            "ESFT: in each layer the fewest experts are trained whose scores sum to this",
            minimum=0.001,
            maximum=1,
        ),
        "expert_sample": Knob(
            131072, "tokens of the training data that experts are scored on", minimum=1
        ),
        "feedforward": Knob(
            ("down_proj",),
            "modules that (IA)³ scales at their inputs; targets at outputs",
            names=True,
        ),
        "virtual_tokens": Knob(20, "virtual tokens in front of each example", minimum=1),
        "prompt_init_text": Knob(
            "", "text whose embeddings prompt tuning starts from; empty: a random start"
        ),
        "encoder_reparameterization_type": Knob(
            "MLP", "network of P-Tuning: MLP or LSTM", choices=("MLP", "LSTM")
        ),
        "encoder_num_layers": Knob(2, "layers of P-Tuning's LSTM", minimum=1),
        "prefix_projection": Knob(False, "makes prefixes by a small network of two layers"),
        "encoder_hidden_size": Knob(
            128, "hidden size of the network that makes virtual tokens or prefixes", minimum=1
        ),
        "placement": Knob(
            "pfeiffer",
            "bottlenecks: houlsby (after both blocks), pfeiffer (after the feed-forward block) or "
            "parallel (beside it)",
            choices=("houlsby", "pfeiffer", "parallel"),
        ),
        "reduction_factor": Knob(16.0, "hidden size over that of a bottleneck", minimum=0.001),
        "activation": Knob("relu", "of a bottleneck: relu, silu, gelu, tanh, …"),
        "scaling": Knob(1.0, "factor on what a bottleneck adds"),
        "init_from": Knob(
            "", "a PEFT adapter to go on from; it brings its own rank, alpha and targets"
        ),
    },
    "quantize": {
        "format": Knob(
            "",
            "format of the frozen base: nf4, int4, int8 or fp8; empty: training.dtype",
        ),
        "modules": Knob(
            ("all-linear",),
            "which modules are quantized, as adapter.targets names them; all-linear leaves out "
            "the head (and embedding, norms and router are never quantized)",
            names=True,
        ),
        "double": Knob(True, "nf4: whether the scales are quantized too"),
        "group_size": Knob(64, "int4: columns that share a scale; 0: a whole row", minimum=0),
        "symmetric": Knob(True, "int4: whether groups have no zero point of their own"),
    },
    "training": {
        "steps": Knob(100, "optimizer updates", minimum=0),
        "batch_size": Knob(8, "rows per update, over all devices", minimum=1),
        "accumulation": Knob(1, "micro-batches that make one update", minimum=1),
        "seed": Knob(0, "seed of factors, data order and dropout", minimum=0),
        "dtype": Knob(
            "bfloat16",
            "dtype of the base weights and of the computation; trainables stay float32",
            choices=("bfloat16", "float32"),
        ),
        "remat": Knob(
            "full", "what the backward pass recomputes: none, full (each layer), or a named policy"
        ),
        "balance_loss": Knob(
            0.0,
            "factor on the loss that spreads tokens over routed experts, beside the loss itself "
            "and never in what is reported as loss; 0: off",
            minimum=0,
        ),
    },
    "optimizer": {
        "name": Knob("adamw", "optax optimizer"),
        "learning_rate": Knob(2e-4, "peak learning rate", minimum=0),
        "schedule": Knob("cosine", "constant, linear or cosine, after the warm-up"),
        "warmup_steps": Knob(0, "updates of linear warm-up from 0", minimum=0),
        "lora_plus_ratio": Knob(1.0, "learning rate of LoRA's B over that of A (LoRA+)", minimum=0),
        "weight_decay": Knob(0.0, "decoupled decay; never on norms and biases", minimum=0),
        "clip_norm": Knob(1.0, "clip the global gradient norm to this; 0: off", minimum=0),
        "b1": Knob(0.9, "decay rate of the first moment", minimum=0, maximum=1),
        "b2": Knob(0.999, "decay rate of the second moment", minimum=0, maximum=1),
        "eps": Knob(1e-8, "added to the root of the second moment", minimum=0),
    },
    "checkpoint": {
        "every": Knob(50, "updates between checkpoints; 0: only at the end", minimum=0),
        "keep": Knob(2, "checkpoints kept", minimum=2),
    },
    "evaluation": {
        "every": Knob(50, "updates between evaluations; 0: none", minimum=0),
        "batch_size": Knob(8, "rows per evaluation batch", minimum=1),
    },
    "logging": {
        "every": Knob(1, "updates between lines of metrics.jsonl; 0: none", minimum=0),
        "tensorboard": Knob(True, "write TensorBoard events beside metrics.jsonl"),
    },
    "mesh": {
        "data": Knob(-1, "devices that split the batch; -1: what the other axes leave", minimum=-1),
        "fsdp": Knob(1, "devices that split batch and weights", minimum=-1),
        "tensor": Knob(1, "devices that split heads and hidden units", minimum=-1),
        "expert": Knob(1, "devices that split routed experts", minimum=-1),
        "sequence": Knob(1, "devices that split the sequence", minimum=-1),
    },
}


def knobs() -> Iterator[tuple[str, Knob]]:
    """Yields every ``("section.name", knob)`` in order."""
    for section, entries in KNOBS.items():
        for name, knob in entries.items():
            yield f"{section}.{name}", knob


def default() -> ml_collections.ConfigDict:
    """Returns the documented default tree, locked: setting a key that does not exist raises."""
    tree = {s: {n: knob.default for n, knob in entries.items()} for s, entries in KNOBS.items()}
    config = ml_collections.ConfigDict(tree, type_safe=False)
    config.lock()
    return config


def _knob(key: str) -> Knob:
    table = dict(knobs())
    if key not in table:
        raise JaxtuneError(f'unknown config key "{key}"{closest(key, table)}')
    return table[key]


def _check(key: str, value: Any) -> Any:
    """Returns `value` in the type of its knob, or raises an error that names the key."""
    knob = _knob(key)
    wanted = type(knob.default)
    if knob.names:
        names = value.split(",") if isinstance(value, str) and "(" not in value else value
        names = (names,) if isinstance(names, str) else tuple(names)
        if value == "" and not knob.default:
            return ()
        if (knob.default and not names) or not all(isinstance(n, str) and n.strip() for n in names):
            raise JaxtuneError(f"{key} takes one or more names, not {value!r}")
        return tuple(n.strip() for n in names)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not wanted:
        raise JaxtuneError(f"{key} takes {wanted.__name__}, not {value!r}")
    if knob.choices and value not in knob.choices:
        raise JaxtuneError(f"{key} takes one of {', '.join(knob.choices)}, not {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise JaxtuneError(f"{key} takes a finite number, not {value!r}")
    if knob.minimum is not None and value < knob.minimum:
        raise JaxtuneError(f"{key} is at least {knob.minimum:g}, not {value!r}")
    if knob.maximum is not None and value > knob.maximum:
        raise JaxtuneError(f"{key} is at most {knob.maximum:g}, not {value!r}")
    return value


def _parse(key: str, text: str) -> Any:
    """Reads the value of a command-line override in the type of its knob."""
    knob = _knob(key)
    if isinstance(knob.default, str):
        return text
    if isinstance(knob.default, bool):
        words = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in words:
            raise JaxtuneError(f"{key} takes true or false, not {text!r}")
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # a list of names; anything else fails its type check


def resolve(
    config: ml_collections.ConfigDict | Mapping[str, Any], overrides: Sequence[str] = ()
) -> Config:
    """Checks a whole config, applies overrides and freezes it.

    Args:
      config: a tree of sections; keys that are absent take their default.
      overrides: ``"section.name=value"`` strings, applied in order.

    Returns:
      An `ml_collections.FrozenConfigDict` of sections.

    Raises:
      JaxtuneError: an unknown key (the message names the closest one) or a bad value.
    """
    if not isinstance(config, (Mapping, ml_collections.ConfigDict)):
        raise JaxtuneError(f"a config is a tree of sections, not {config!r}")
    tree = {s: {n: knob.default for n, knob in entries.items()} for s, entries in KNOBS.items()}
    for section, entries in dict(config).items():
        if section not in KNOBS or not isinstance(entries, (Mapping, ml_collections.ConfigDict)):
            raise JaxtuneError(f'unknown config section "{section}"{closest(section, KNOBS)}')
        for name, value in dict(entries).items():
            tree[section][name] = _check(f"{section}.{name}", value)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise JaxtuneError(f"--config.{key} needs a value: --config.{key}=…")
        value = _check(key, _parse(key, text))
        section, name = key.split(".", 1)
        tree[section][name] = value
    batch, micro = tree["training"]["batch_size"], tree["training"]["accumulation"]
    if batch % micro:
        raise JaxtuneError(
            f"training.batch_size={batch} does not divide into training.accumulation={micro} "
            "micro-batches"
        )
    return ml_collections.FrozenConfigDict(tree)


def load_file(path: str | Path) -> Any:
    """Runs a config file and returns what its ``get_config()`` returns.

    A config file is a Python program: run only files that you trust.

    Raises:
      JaxtuneError: no such file, no ``get_config``, or an error inside the file.
    """
    path = Path(path)
    if not path.is_file():
        there = [file.name for file in path.parent.glob("*.py")]
        raise JaxtuneError(f"{path}: no such config file{closest(path.name, there)}")
    spec = importlib.util.spec_from_file_location("jaxtune_config_file", path)
    if spec is None or spec.loader is None:
        raise JaxtuneError(f"{path}: a config file is a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except JaxtuneError:
        raise
    except Exception as error:
        line = error.lineno if isinstance(error, SyntaxError) else _line_within(path, error)
        reason = " ".join(str(error).split())
        raise JaxtuneError(f"{path}:{line}: {type(error).__name__}: {reason}") from error
    if not isinstance(config, (Mapping, ml_collections.ConfigDict)):
        raise JaxtuneError(f"{path}: get_config() returns {config!r} instead of a config")
    return config


def _line_within(path: Path, error: Exception) -> int:
    """Returns the number of the line in `path` that an error came from; 0 if none did."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno or 0 for frame in frames if Path(frame.filename) == path]
    return lines[-1] if lines else 0


def to_json(config: Config) -> str:
    """Renders a resolved config as the JSON that a run directory keeps."""
    return json.dumps(config.to_dict(), indent=2, ensure_ascii=False) + "\n"


def from_json(path: str | Path) -> Config:
    """Reads a config that `to_json` wrote; the config file that made it is never run again."""
    return resolve(json.loads(Path(path).read_text(encoding="utf-8")))
