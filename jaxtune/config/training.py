"""The sections of the training run: length, optimizer, checkpoints, evaluations and logs."""

from __future__ import annotations

import dataclasses

from jaxtune.config.option import Section, option
from jaxtune.registry import DTYPES, OPTIMIZERS, REMAT_POLICIES, SCHEDULES


@dataclasses.dataclass(frozen=True)
class TrainingConfig(Section):
    """The ``training`` section. Only one of ``steps``, ``epochs`` and ``tokens`` may be set."""

    steps: int = option(
        100, "length of the run in optimizer steps, unless epochs or tokens are set", minimum=0
    )
    epochs: float = option(
        0.0, "length of the run in passes over the data; 0: unset", minimum=0, maximum=10**6
    )
    tokens: int = option(
        0, "length of the run in tokens without padding; 0: unset", minimum=0, maximum=10**15
    )
    continue_from: str = option(
        "",
        "run, or its checkpoint RUN/checkpoints/N, whose trained weights and optimizer state a new "
        "run starts from; empty: none",
    )
    batch_size: int = option(8, "rows per optimizer step, over all devices", minimum=1)
    accumulation: int = option(
        0,
        "micro-batches per optimizer step; 0: as few as fit into the memory of the devices",
        minimum=0,
    )
    seed: int = option(
        0, "seed of initial values, data order, dropout and noise", minimum=0, maximum=2**63 - 1
    )
    dtype: str = option(
        "bfloat16",
        "dtype of base weights and computation; trainable weights are float32, and float16 uses "
        "loss scaling",
        choices=DTYPES,
    )
    remat: str = option(
        "full",
        "rematerialization in the backward pass: full (each layer), save_attention, save_qkv, "
        "save_mlp or none",
        choices=REMAT_POLICIES,
    )
    balance_loss: float = option(
        0.0,
        "factor on the load-balancing loss of routed experts, which is added to the loss and "
        "reported separately; 0: off",
        minimum=0,
    )
    watchdog_minutes: float = option(
        0.0,
        "longest time between two steps in minutes, including evaluations and saves; after it the "
        "run prints the stacks of its threads and exits with code 75; 0: off",
        minimum=0,
        least=0.05,  # every step takes longer than a limit near 0, so no restart would get further
        maximum=10**6,
    )
    label_smoothing: float = option(
        0.0,
        "share of each target that is spread evenly over the vocabulary; not part of the reported "
        "loss",
        minimum=0,
        maximum=0.999,
    )
    z_loss: float = option(
        0.0,
        "factor on the squared log-normalizer of the logits; not part of the reported loss; 0: off",
        minimum=0,
    )
    neftune_alpha: float = option(
        0.0, "NEFTune: scale of the noise added to embeddings in training; 0: off", minimum=0
    )
    max_bad_steps: int = option(5, "consecutive skipped steps after which the run stops", minimum=1)
    spike_factor: float = option(
        0.0,
        "skip a step whose loss or gradient norm exceeds this multiple of its running mean; 0: off",
        minimum=0,
    )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Section):
    """The ``optimizer`` section."""

    name: str = option("adamw", "optimizer: adamw, adafactor, lion or sgd", choices=OPTIMIZERS)
    learning_rate: float = option(2e-4, "peak learning rate", minimum=0)
    schedule: str = option(
        "cosine", "schedule after the warm-up: constant, linear, cosine or wsd", choices=SCHEDULES
    )
    warmup_steps: int | float = option(
        0, "steps of linear warm-up from 0, or a share of the run below 1", minimum=0, share=True
    )
    decay_steps: int | float = option(
        0.1,
        "wsd: steps of the linear decay at the end, or a share of the run below 1",
        minimum=0,
        share=True,
    )
    group_rates: tuple[str, ...] = option(
        (),
        "learning rates of parameter groups, such as lora_B=4e-4 or embed_tokens=0.1x; a pattern "
        "matches whole names within a path, and the first match applies",
        names=True,
    )
    lora_plus_ratio: float = option(
        1.0,
        "LoRA+: learning rate of the factors B divided by that of all other parameters",
        minimum=0,
    )
    weight_decay: float = option(
        0.0, "decoupled weight decay; norms and biases are excluded", minimum=0
    )
    clip_norm: float = option(1.0, "maximum global norm of the gradient; 0: no clipping", minimum=0)
    b1: float = option(0.9, "decay rate of the first moment; sgd: momentum", minimum=0, maximum=1)
    b2: float = option(
        0.999,
        "decay rate of the second moment; lion: of the momentum, usually 0.99",
        minimum=0,
        maximum=1,
    )
    eps: float = option(1e-8, "adamw: added to the root of the second moment", minimum=0)
    moment_dtype: str = option(
        "float32",
        "dtype of the first moment (sgd: of the momentum)",
        choices=("float32", "bfloat16"),
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Section):
    """The ``checkpoint`` section."""

    every: int | str = option(
        50,
        "interval between checkpoints: steps, or 0.5 epochs, 10 minutes, 1M tokens; 0: only at "
        "the end",
        interval=True,
    )
    keep: int = option(
        2, "number of checkpoints kept, in addition to the best one of full fine-tuning", minimum=2
    )
    timeout_minutes: float = option(
        60.0,
        "longest time in minutes that writing a checkpoint may take, or hashing one megabyte of "
        "it; after it the file system counts as stalled: the run prints the stacks of its threads "
        "and exits with code 75; 0: no limit",
        minimum=0,
        least=0.05,
    )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(Section):
    """The ``evaluation`` section."""

    every: int | str = option(
        50, "interval between evaluations, as in checkpoint.every; 0: none", interval=True
    )
    batch_size: int = option(8, "rows per evaluation batch", minimum=1)
    stop_metric: str = option(
        "loss", "evaluation metric that selects the best adapter and stops the run early"
    )
    stop_patience: int = option(
        0, "consecutive evaluations without improvement that stop the run; 0: never", minimum=0
    )
    stop_min_change: float = option(
        0.0, "smallest change of the metric that counts as improvement", minimum=0
    )
    generate: int = option(
        0,
        "number of prompts per held-out set to answer at each evaluation, for exact_match and "
        "samples.jsonl",
        minimum=0,
    )


@dataclasses.dataclass(frozen=True)
class LoggingConfig(Section):
    """The ``logging`` section."""

    every: int | str = option(
        1, "interval between lines of metrics.jsonl, as in checkpoint.every; 0: none", interval=True
    )
    tensorboard: bool = option(True, "write TensorBoard events as well as metrics.jsonl")
    wandb: str = option("", "Weights & Biases project to log to; empty: none")


@dataclasses.dataclass(frozen=True)
class ProfileConfig(Section):
    """The ``profile`` section."""

    steps: tuple[str, ...] = option(
        (), "first and last step of an XProf trace, such as 10,20", names=True
    )
