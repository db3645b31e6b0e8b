"""The choices of a config, and the options that each of them reads.

Each choice is one line here, which names the code that implements it. The tables import nothing: an
entry is loaded when it is used, so `jaxtune --help` and the check of a config do not import jax.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any


@dataclasses.dataclass(frozen=True)
class Entry:
    """One choice.

    Attributes:
      target: implementation of the choice, ``"module:attribute"``.
      options: options that take effect with this choice but not with every other one, as names in
        the section of the choice or as ``"section.name"``.
    """

    target: str
    options: tuple[str, ...] = ()

    def load(self) -> Any:
        """Imports the module and returns the attribute."""
        module, _, attribute = self.target.partition(":")
        return getattr(importlib.import_module(module), attribute)


_PROJECTIONS = ("targets", "layers", "modules_to_save")
_LORA = (
    *("rank", "alpha", "rslora", "dropout", "rank_pattern", "alpha_pattern"),
    *("bias", "new_tokens", "train_tokens", "optimizer.lora_plus_ratio"),
    *_PROJECTIONS,
)
_NETWORK = (
    *("virtual_tokens", "dropout", "encoder_hidden_size"),
    *("encoder_reparameterization_type", "encoder_num_layers"),
)
_BOTTLENECK = ("placement", "reduction_factor", "activation", "scaling", "dropout")
_ESFT = ("expert_scores", "expert_score", "expert_threshold", "expert_sample")

METHODS = {
    "lora": Entry("jaxtune.adapters.projections.lora:from_config", _LORA),
    "dora": Entry("jaxtune.adapters.projections.dora:from_config", _LORA),
    "pissa": Entry("jaxtune.adapters.projections.pissa:from_config", _LORA),
    "vera": Entry(
        "jaxtune.adapters.projections.vera:from_config", ("rank", "dropout", *_PROJECTIONS)
    ),
    "ia3": Entry("jaxtune.adapters.projections.ia3:from_config", ("feedforward", *_PROJECTIONS)),
    "bitfit": Entry("jaxtune.adapters.projections.bitfit:from_config", _PROJECTIONS),
    "prompt": Entry(
        "jaxtune.adapters.virtual.prompt:from_config", ("virtual_tokens", "prompt_init_text")
    ),
    "ptuning": Entry("jaxtune.adapters.virtual.ptuning:from_config", _NETWORK),
    "prefix": Entry(
        "jaxtune.adapters.virtual.prefix:from_config",
        ("virtual_tokens", "prefix_projection", "encoder_hidden_size"),
    ),
    "bottleneck": Entry("jaxtune.adapters.virtual.bottleneck:from_config", _BOTTLENECK),
    "esft": Entry("jaxtune.adapters.esft.esft:from_config", _ESFT),
    "full": Entry("jaxtune.adapters.full:from_config", ("freeze",)),
}
"""``adapter.method``: ``AdapterConfig -> Method``."""

WEIGHT_FORMATS = {
    "nf4": Entry("jaxtune.quant.nf4:NormalFloat4", ("modules", "double")),
    "int4": Entry("jaxtune.quant.int4:Int4", ("modules", "group_size", "symmetric")),
    "int8": Entry("jaxtune.quant.int8:Int8", ("modules",)),
    "fp8": Entry("jaxtune.quant.fp8:Float8", ("modules",)),
}
"""``quantize.format``: a `Format`, whose fields are the options other than ``modules``."""

OPTIMIZERS = {
    "adamw": Entry("jaxtune.training.optimizer:adamw", ("b1", "b2", "eps", "moment_dtype")),
    "adafactor": Entry("jaxtune.training.optimizer:adafactor"),
    "lion": Entry("jaxtune.training.optimizer:lion", ("b1", "b2", "moment_dtype")),
    "sgd": Entry("jaxtune.training.optimizer:sgd", ("b1", "moment_dtype")),
}
"""``optimizer.name``: ``OptimizerConfig -> optax.GradientTransformation``."""

SCHEDULES = {
    "constant": Entry("jaxtune.training.optimizer:constant"),
    "linear": Entry("jaxtune.training.optimizer:linear"),
    "cosine": Entry("jaxtune.training.optimizer:cosine"),
    "wsd": Entry("jaxtune.training.optimizer:warmup_stable_decay", ("decay_steps",)),
}
"""``optimizer.schedule``: ``(peak rate, steps, decay steps) -> optax.Schedule``."""

DTYPES = ("bfloat16", "float16", "float32")
"""``training.dtype``, and the dtypes that a model is loaded, saved and converted in."""

ROW_FORMATS = {
    "messages": Entry("jaxtune.data.row_formats:MESSAGES"),
    "prompt-completion": Entry("jaxtune.data.row_formats:PROMPT_COMPLETION"),
    "alpaca": Entry("jaxtune.data.row_formats:ALPACA"),
    "sharegpt": Entry("jaxtune.data.row_formats:SHAREGPT"),
    "text": Entry("jaxtune.data.row_formats:TEXT"),
    "tokenized": Entry("jaxtune.data.row_formats:TOKENIZED"),
}
"""``data.format``: a `DataFormat`."""

ATTENTION_BACKENDS = {
    "xla": Entry("jaxtune.layers.attention_portable:xla_attention"),
    "blockwise": Entry("jaxtune.layers.attention_portable:blockwise_attention"),
    "cudnn": Entry("jaxtune.layers.attention_kernels:cudnn_attention"),
    "splash": Entry("jaxtune.layers.attention_kernels:splash_attention"),
}
"""``model.attention``, in addition to ``auto``."""

REMAT_POLICIES: dict[str, tuple[str, ...] | None] = {
    "full": (),
    "save_attention": ("attention",),
    "save_qkv": ("attention", "q_proj", "k_proj", "v_proj"),
    "save_mlp": ("attention", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
    "none": None,
}
"""``training.remat``: the activations of a layer that are saved for its backward pass, by their
`checkpoint_name`; None saves all. Ordered from least memory to highest speed."""

PLACEMENTS = {
    "houlsby": (True, True, "block"),
    "pfeiffer": (False, True, "sum"),
    "parallel": (False, True, "stream"),
}
"""``adapter.placement``: whether a bottleneck follows attention, whether one follows the
feed-forward block, and its input; see `jaxtune.adapters.virtual.bottleneck.INPUTS`."""

SELECTORS = {
    "adapter.method": METHODS,
    "quantize.format": WEIGHT_FORMATS,
    "optimizer.name": OPTIMIZERS,
    "optimizer.schedule": SCHEDULES,
}
"""Options whose value determines which other options take effect."""
