"""Every knob of a run: its default, what it does and which values it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Knob:
    """One setting: its default, what it does, and which values it takes."""

    default: Any
    help: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    names: bool = False  # a name, a comma-separated string of names, or a sequence of names
    share: bool = False  # a whole number, or a share below 1
    interval: bool = False  # what `parse_interval` reads
    json: bool = False  # a mapping, or a JSON object as text, which is what is kept


KNOBS: dict[str, dict[str, Knob]] = {
    "model": {
        "path": Knob("", "Hugging Face directory, hub id or .gguf file of the base model"),
        "revision": Knob("", "commit, tag or branch of a hub id; empty: its default branch"),
        "attention": Knob(
            "auto", "attention backend: auto (by platform), xla, blockwise, cudnn or splash"
        ),
    },
    "data": {
        "train": Knob(
            "",
            "training examples: files (.jsonl, .json, .csv, .tsv, .txt, .parquet; .gz, .zst), "
            "patterns, directories, saved data sets or hub ids, with commas between; NAME@2 shows "
            "that one twice an epoch",
        ),
        "eval": Knob("", "held-out examples, in the same forms; empty: none but data.eval_split"),
        "eval_split": Knob(
            0.0,
            "held out of data.train: so many rows, or below 1 that share; chosen by what rows say",
            minimum=0,
        ),
        "overlap": Knob(
            "error",
            "rows of data.eval that are in data.train too: error, drop (them from data.train) or "
            "keep",
            choices=("error", "drop", "keep"),
        ),
        "revision": Knob("", "commit, tag or branch of data sets with a hub id"),
        "format": Knob(
            "",
            "form of the rows: messages, prompt-completion, alpaca, sharegpt, text or tokenized; "
            "empty: the one that their keys fit",
        ),
        "targets": Knob(
            "all",
            "what is learnt of a conversation: all (the assistant's turns but those with train: "
            "false), last (the last of them) or marked (those with train: true)",
            choices=("all", "last", "marked"),
        ),
        "reasoning": Knob(
            "keep",
            "what the assistant says up to </think>: keep or drop",
            choices=("keep", "drop"),
        ),
        "empty_reasoning": Knob(
            "learn",
            "the empty think block that a template gives a turn without reasoning: learn or mask",
            choices=("learn", "mask"),
        ),
        "max_length": Knob(1024, "tokens in a row", minimum=2),
        "packing": Knob(True, "best-fit packing of several examples into a row"),
        "shuffle": Knob(True, "a new order in every epoch, a function of training.seed"),
        "too_long": Knob(
            "error",
            "an example over data.max_length: error, drop, truncate (its end), truncate_start or "
            "windows (several examples); each is counted",
            choices=("error", "drop", "truncate", "truncate_start", "windows"),
        ),
        "bad_rows": Knob(
            "error",
            "a row that cannot be used: error, or skip (each is named in the log)",
            choices=("error", "skip"),
        ),
        "bad_rows_limit": Knob(100, "data.bad_rows=skip: more bad rows are an error", minimum=0),
        "chat_template": Knob(
            "",
            "used in place of the checkpoint's own chat template: a Jinja file, or the name of a "
            "built-in one such as deepseek-v3",
        ),
        "chat_template_kwargs": Knob(
            "",
            'arguments of the chat template, a JSON object such as {"enable_thinking": false}; '
            "those of a row (chat_template_kwargs) come before them",
            json=True,
        ),
        "prompt_templates": Knob(
            "",
            "augmentation: a file with a wording on each line, with {prompt} in it; each prompt is "
            "put into one of them",
        ),
        "mask_tokens": Knob(
            0.0,
            "augmentation: share of input tokens replaced by others of the data, anew every time; "
            "targets stay",
            minimum=0,
            maximum=0.9,
        ),
        "cache": Knob(
            "", "where jaxtune data prepare keeps tokenized data; empty: ~/.cache/jaxtune/data"
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
        "bias": Knob(
            "none",
            "LoRA and its kin: biases that are trained as well: none, all, or lora_only (those of "
            "the targets)",
            choices=("none", "all", "lora_only"),
        ),
        "new_tokens": Knob(
            0,
            "how many of the tokenizer's last tokens have their rows of the embedding, and of a "
            "head of its own, trained",
            minimum=0,
        ),
        "train_tokens": Knob(
            (), "tokens by name whose rows are trained as well, such as <sql>,</sql>", names=True
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
            "", "a PEFT adapter to start from; it brings its own settings, but for adapter.dropout"
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
        "steps": Knob(100, "optimizer updates; unless epochs or tokens say how long", minimum=0),
        "epochs": Knob(0.0, "length of the run in passes over the data; 0: see steps", minimum=0),
        "tokens": Knob(
            0, "length of the run in tokens, padding not counted; 0: see steps", minimum=0
        ),
        "batch_size": Knob(8, "rows per update, over all devices", minimum=1),
        "accumulation": Knob(1, "micro-batches that make one update", minimum=1),
        "seed": Knob(0, "seed of factors, data order, dropout and noise", minimum=0),
        "dtype": Knob(
            "bfloat16",
            "dtype of the base weights and of the computation; trainables stay float32, and "
            "float16 scales its loss",
            choices=("bfloat16", "float16", "float32"),
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
        "watchdog_minutes": Knob(
            0.0,
            "minutes without an update, evaluations and saves included, after which a run counts "
            "as stuck: it shows what it was doing and exits with 75; 0: off",
            minimum=0,
        ),
        "label_smoothing": Knob(
            0.0,
            "share of each target that is spread evenly over the vocabulary; not in what is "
            "reported as loss",
            minimum=0,
            maximum=0.999,
        ),
        "z_loss": Knob(
            0.0,
            "factor on the square of the log-normaliser of the logits; not in what is reported as "
            "loss; 0: off",
            minimum=0,
        ),
        "neftune_alpha": Knob(
            0.0, "size of the noise on embeddings while training (NEFTune); 0: off", minimum=0
        ),
        "max_bad_steps": Knob(
            5, "updates in a row that may be skipped before the run stops", minimum=1
        ),
        "spike_factor": Knob(
            0.0,
            "an update is skipped whose loss or gradient norm is this many times its running "
            "mean; 0: off",
            minimum=0,
        ),
    },
    "optimizer": {
        "name": Knob("adamw", "adamw, adafactor, lion or sgd"),
        "learning_rate": Knob(2e-4, "peak learning rate", minimum=0),
        "schedule": Knob("cosine", "constant, linear, cosine or wsd, after the warm-up"),
        "warmup_steps": Knob(
            0, "updates of linear warm-up from 0, or their share of the run", minimum=0, share=True
        ),
        "decay_steps": Knob(
            0.1,
            "wsd: updates of the linear decline at the end, or their share of the run",
            minimum=0,
            share=True,
        ),
        "group_rates": Knob(
            (),
            "other learning rates, such as lora_B=4e-4 or embed_tokens=0.1x; a pattern matches "
            "whole names within a path, and the first one counts",
            names=True,
        ),
        "lora_plus_ratio": Knob(1.0, "learning rate of LoRA's B over that of A (LoRA+)", minimum=0),
        "weight_decay": Knob(0.0, "decoupled decay; never on norms and biases", minimum=0),
        "clip_norm": Knob(1.0, "clip the global gradient norm to this; 0: off", minimum=0),
        "b1": Knob(0.9, "decay rate of the first moment; sgd: momentum", minimum=0, maximum=1),
        "b2": Knob(
            0.999,
            "decay rate of the second moment; lion: of the momentum, for which 0.99 is usual",
            minimum=0,
            maximum=1,
        ),
        "eps": Knob(1e-8, "adamw: added to the root of the second moment", minimum=0),
        "moment_dtype": Knob(
            "float32",
            "dtype in which the first moment (sgd: the momentum) is kept",
            choices=("float32", "bfloat16"),
        ),
    },
    "checkpoint": {
        "every": Knob(
            50,
            "between checkpoints: updates, or as in 0.5 epochs, 10 minutes, 1M tokens; 0: only "
            "at the end",
            interval=True,
        ),
        "keep": Knob(2, "checkpoints kept, beside the best of full fine-tuning", minimum=2),
    },
    "evaluation": {
        "every": Knob(50, "between evaluations, as in checkpoint.every; 0: none", interval=True),
        "batch_size": Knob(8, "rows per evaluation batch", minimum=1),
        "stop_metric": Knob(
            "loss", "score of an evaluation that chooses the best adapter and stops the run"
        ),
        "stop_patience": Knob(
            0, "evaluations in a row without a better score that stop the run; 0: never", minimum=0
        ),
        "stop_min_change": Knob(0.0, "change of the score that counts as better", minimum=0),
        "generate": Knob(
            0,
            "held-out prompts that each evaluation answers, for exact_match and samples.jsonl",
            minimum=0,
        ),
    },
    "logging": {
        "every": Knob(
            1, "between lines of metrics.jsonl, as in checkpoint.every; 0: none", interval=True
        ),
        "tensorboard": Knob(True, "write TensorBoard events beside metrics.jsonl"),
        "wandb": Knob("", "project of Weights & Biases to log to as well; empty: none"),
    },
    "profile": {
        "steps": Knob((), "first and last update of a trace for XProf, such as 10,20", names=True),
    },
    "mesh": {
        "data": Knob(-1, "devices that split the batch; -1: what the other axes leave", minimum=-1),
        "fsdp": Knob(1, "devices that split batch and weights", minimum=-1),
        "tensor": Knob(1, "devices that split heads and hidden units", minimum=-1),
        "expert": Knob(1, "devices that split batch and routed experts", minimum=-1),
        "sequence": Knob(1, "devices that split the sequence", minimum=-1),
    },
}


def knobs() -> Iterator[tuple[str, Knob]]:
    """Yields every ``("section.name", knob)`` in order."""
    for section, entries in KNOBS.items():
        for name, knob in entries.items():
            yield f"{section}.{name}", knob
