"""Reads GGUF checkpoints of the LLaMA and Qwen families under their Hugging Face names.

Block formats are decoded by the ``gguf`` package.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from jaxtune.checkpoints.formats.gguf_header import TensorInfo, read_header
from jaxtune.checkpoints.source import ALL, ReadFile, byte_range, truncated
from jaxtune.errors import JaxtuneError, closest, lookup, shown
from jaxtune.layers.rope import rope_from_config
from jaxtune.quant import Format

_ROWS_PER_CHUNK = 2048  # keeps the decoder's temporaries far smaller than a large tensor
_WHOLE_MODEL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_ROPE_FACTORS = "rope_freqs.weight"
# The values of all published checkpoints with llama3 scaling. A GGUF stores only their effect, the
# divisors of the frequencies.
_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _hugging_face_name(name: str) -> str | None:
    """Returns the Hugging Face name of a GGUF tensor, or None if it has no counterpart."""
    stem, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem, re.ASCII)
    if layer and layer[2] in _LAYER_NAMES:
        return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{kind}"
    return f"{_WHOLE_MODEL_NAMES[stem]}.{kind}" if stem in _WHOLE_MODEL_NAMES else None


def _decimal(value: float) -> float:
    """Returns the shortest decimal of the same float32 value: 1e-05, not 9.99999974737875e-06."""
    return float(str(np.float32(value)))


class GGUFSource:
    """The tensors and config of a GGUF file in the form of a Hugging Face checkpoint.

    Attributes:
      path: the file.
      config: equivalent content of ``config.json``.

    Raises:
      JaxtuneError: a damaged file, an unknown architecture, or a tensor without a counterpart.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.mapped = None  # every read maps a part of the file
        self.on_read: Callable[[int, int], None] | None = None
        self._metadata, infos = read_header(self.path)
        place = f"{self.path}: general.architecture"
        self._architecture = str(self._metadata.get("general.architecture", ""))
        class_name = lookup(_ARCHITECTURES, self._architecture, place)
        self._tensors: dict[str, TensorInfo] = {}
        for gguf_name, info in infos.items():
            name = _hugging_face_name(gguf_name)
            if name is not None:
                self._tensors[name] = info
            elif gguf_name != _ROPE_FACTORS:
                raise JaxtuneError(
                    f'{self.path}: tensor "{gguf_name}" does not belong to a '
                    f"{self._architecture} model"
                )
        self._rope_factors = infos.get(_ROPE_FACTORS)
        self.config = self._build_config(class_name)
        del self._metadata  # frees the vocabulary, by far the largest part of this object

    def names(self) -> list[str]:
        """Returns the Hugging Face tensor names, in the order of the file."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor, ``[out, in]`` for a projection."""
        return self._info(name).shape

    def dtype(self, name: str) -> np.dtype:
        """Returns float32, the dtype of the result of `read` for every block type."""
        self._info(name)
        return np.dtype(np.float32)

    def where(self, name: str) -> str:
        """Returns the file that holds a tensor, for messages."""
        self._info(name)
        return str(self.path)

    def files(self) -> Sequence[ReadFile]:
        """Returns the file."""
        return [self]

    def read(self, name: str, rows: slice = ALL) -> np.ndarray:
        """Decodes one tensor.

        Args:
          name: name of the tensor.
          rows: rows to return; ignored for a scalar.

        Returns:
          float32 of `shape(name)`; read-only and memory-mapped if the file holds float32. The
          query and key rows of LLaMA are returned in Hugging Face's order: GGUF interleaves both
          halves of each head for its rotary embedding.

        Raises:
          JaxtuneError: an unknown tensor, or a block type that cannot be decoded.
        """
        info = self._info(name)
        order = self._row_order(name, info)
        if len(info.shape) == 1:
            return self._decode(info, name)[ALL if order is None else order][rows]
        return self._decode(info, name, rows if order is None else order[rows])

    def read_parts(self, name: str, form: Format) -> None:
        """Returns None: GGUF's block types are not among jaxtune's weight formats."""
        del name, form

    def _row_order(self, name: str, info: TensorInfo) -> np.ndarray | None:
        """Returns int [rows], the row in the file of each row of a tensor; None if identical.

        With heads of size d, row 2 i + j of a head in the file is row i + j · d / 2 in Hugging
        Face's order, where j is the half of the head.
        """
        heads = {
            "q_proj": self.config["num_attention_heads"],
            "k_proj": self.config["num_key_value_heads"],
        }.get(name.split(".")[-2])
        if heads is None or self._architecture != "llama":
            return None
        rows = info.shape[0]
        if rows % (2 * heads):
            raise JaxtuneError(f'{self.path}: tensor "{name}" has {rows} rows for {heads} heads')
        return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)

    def _info(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise JaxtuneError(f'{self.path}: no tensor "{name}"{closest(name, self._tensors)}')
        return self._tensors[name]

    def _decode(self, info: TensorInfo, name: str, chosen: slice | np.ndarray = ALL) -> np.ndarray:
        """Returns a tensor, or chosen rows of a matrix, in the file's order, in float32."""
        if not info.size:
            return np.zeros(info.shape, np.float32)[chosen]
        if self.on_read is not None:
            rows = chosen
            if not isinstance(rows, slice):  # the rows of a head are interleaved
                rows = slice(int(rows.min()), int(rows.max()) + 1) if rows.size else slice(0)
            first, last = byte_range(info.shape, info.size, rows)
            self.on_read(info.offset + first, info.offset + last)
        if self.path.stat().st_size < info.offset + info.size:
            raise truncated(self.path)
        packed = np.memmap(self.path, np.uint8, "r", info.offset, (info.size,))
        if info.block_type == GGMLQuantizationType.F32:
            return packed.view("<f4").reshape(info.shape)[chosen]
        packed = packed.reshape(math.prod(info.shape[:-1]), -1)[chosen]
        rows = packed.shape[0]
        values = np.empty((rows, info.shape[-1]), np.float32)
        try:
            for start in range(0, rows, _ROWS_PER_CHUNK):
                chunk = slice(start, start + _ROWS_PER_CHUNK)
                values[chunk] = dequantize(packed[chunk], info.block_type)
        except NotImplementedError:
            raise JaxtuneError(
                f'{self.path}: tensor "{name}" has block type {info.block_type.name}, which cannot '
                f"be decoded"
            ) from None
        return values.reshape(-1, *info.shape[1:])

    def _key(self, key: str, default: Any = None) -> Any:
        """Returns a value of the metadata under the architecture's prefix.

        A list with one value per layer is accepted if the values are equal.

        Raises:
          JaxtuneError: the value is missing and has no default, or it differs between layers.
        """
        value = self._metadata.get(f"{self._architecture}.{key}", default)
        if value is None:
            raise JaxtuneError(f'{self.path}: metadata lacks "{self._architecture}.{key}"')
        if isinstance(value, list):
            if not value or any(one != value[0] for one in value):
                raise JaxtuneError(
                    f"{self.path}: {self._architecture}.{key} differs between layers: {value}"
                )
            value = value[0]
        return value

    def _count(self, key: str, default: int | None = None) -> int:
        """Returns a value of the metadata that must be a positive integer."""
        value = self._key(key, default)
        if not isinstance(value, int) or value < 1:
            raise JaxtuneError(
                f"{self.path}: {self._architecture}.{key}={value!r} is not a positive integer"
            )
        return value

    def _number(self, key: str, default: Any = None) -> float:
        """Returns a number of the metadata; see `_key`.

        Raises:
          JaxtuneError: the value is not a number.
        """
        value = self._key(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise JaxtuneError(
                f"{self.path}: {self._architecture}.{key}={shown(value)} is not a number"
            )
        return _decimal(value)

    def _build_config(self, class_name: str) -> dict[str, Any]:
        heads, hidden_size = self._count("attention.head_count"), self._count("embedding_length")
        rotary = self._key("rope.dimension_count", 0) if self._architecture == "llama" else 0
        head_dim = self._count("attention.key_length", rotary or hidden_size // heads)
        if rotary and rotary != head_dim:
            raise JaxtuneError(
                f"{self.path}: llama.rope.dimension_count={rotary} is not the head size {head_dim}"
            )
        config = {
            "architectures": [class_name],
            "model_type": self._architecture,
            "hidden_size": hidden_size,
            "num_hidden_layers": self._count("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._count("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "intermediate_size": self._count("feed_forward_length"),
            "hidden_act": "silu",
            "vocab_size": self.shape("model.embed_tokens.weight")[0],
            "max_position_embeddings": self._count("context_length"),
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "rope_theta": self._number("rope.freq_base", 10000.0),
            "rope_scaling": self._rope_scaling(head_dim),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "torch_dtype": "bfloat16",
        }
        if self._architecture != "qwen2":  # in Qwen2 biases are part of the architecture
            first = "model.layers.0"
            config["attention_bias"] = f"{first}.self_attn.q_proj.bias" in self._tensors
        if self._architecture == "llama":
            config["mlp_bias"] = "model.layers.0.mlp.up_proj.bias" in self._tensors
        for token, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
            config[f"{token}_token_id"] = self._metadata.get(f"tokenizer.ggml.{key}_token_id")
        return config

    def _rope_scaling(self, head_dim: int) -> dict[str, Any] | None:
        """Returns the ``rope_scaling`` entry of the config, or None without scaling."""
        kind = self._key("rope.scaling.type", "none")
        factor = self._number("rope.scaling.factor", self._number("rope.scale_linear", 1.0))
        if self._rope_factors is not None:
            return self._llama3_rope(self._rope_factors, head_dim)
        if kind == "none" and factor == 1.0:
            return None
        scaling = {"rope_type": "linear" if kind == "none" else kind, "factor": factor}
        if scaling["rope_type"] == "linear":
            return scaling
        if kind != "yarn":
            raise JaxtuneError(
                f'{self.path}: rope.scaling.type="{kind}" is unknown (known: linear, none, yarn)'
            )
        scaling["original_max_position_embeddings"] = self._key(
            "rope.scaling.original_context_length"
        )
        for name, key in (
            ("attn_factor", "attn_factor"),
            ("attn_factor", "yarn_attn_factor"),
            ("beta_fast", "yarn_beta_fast"),
            ("beta_slow", "yarn_beta_slow"),
        ):
            if f"{self._architecture}.rope.scaling.{key}" in self._metadata:
                scaling[name] = self._number(f"rope.scaling.{key}")
        return scaling

    def _llama3_rope(self, info: TensorInfo, head_dim: int) -> dict[str, Any]:
        """Recovers llama3 scaling from the divisors of the frequencies that the file holds.

        Only the factor varies between published checkpoints. It is read off the divisors, and the
        divisors computed from it must match the file's.
        """
        divisors = self._decode(info, _ROPE_FACTORS)
        theta = self._number("rope.freq_base", 10000.0)
        # The largest divisor is the factor, up to the rounding of a float32 division.
        scaling = {"rope_type": "llama3", "factor": round(float(divisors.max()), 4)} | _LLAMA3_ROPE
        plain = np.array(rope_from_config({"rope_theta": theta}, head_dim).inv_freq)
        try:
            scaled = rope_from_config({"rope_theta": theta, "rope_scaling": scaling}, head_dim)
            expected = plain / np.array(scaled.inv_freq)
        except JaxtuneError:  # the factor is not positive
            expected = np.zeros(0)
        # The file's divisors were computed in float32 from powers of theta, hence the tolerance.
        if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
            raise JaxtuneError(
                f'{self.path}: tensor "{_ROPE_FACTORS}" is not the llama3 scaling of {_LLAMA3_ROPE}'
            )
        return scaling
