"""Attention kernels of accelerators: splash on TPU, cuDNN on NVIDIA GPUs.

Neither holds a [T, S] array. Inputs that a kernel does not support go to the blockwise backend,
which is logged once. Each segment is contiguous in its row, as in packed batches.

B batch, T queries, S keys, H query heads, K key-value heads, D head dimension. Arguments and
results as in `jaxtune.layers.attention.attention`.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxtune.compatibility import private_module
from jaxtune.layers.attention_portable import blockwise_attention
from jaxtune.parallel.rules import devices_along, even_spec

logger = logging.getLogger(__name__)

Kernel = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

# Lanes of a TPU's vector unit; splash needs a multiple of them in queries and in keys.
SPLASH_LANES = 128
# The largest tile of queries and of keys for splash; larger ones overflow VMEM.
SPLASH_BLOCK = 512
# Segments per row that the cuDNN kernel is compiled for. It keeps float32 [B × this, H, T].
CUDNN_SEGMENTS = 32


def cudnn() -> Any | None:
    """Returns JAX's private module of cuDNN's attention, or None if JAX no longer has it.

    The public `jax.nn.dot_product_attention` cannot pass the offsets of packed segments to cuDNN:
    packing would cost a [T, T] mask.
    """
    return private_module(
        "jax._src.cudnn.fused_attention_stablehlo",
        ("dot_product_attention", "check_cudnn_version", "MaskType"),
        "attention on GPUs is blockwise, which is slower than cuDNN's",
    )


@functools.cache
def _log_once(message: str) -> None:
    logger.warning(message)


def on_each_device(
    kernel: Kernel, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array
) -> jax.Array:
    """Runs a kernel that the compiler cannot partition on the rows and heads of each device.

    Args:
      kernel: takes (q, k, v, segments) of one device and returns its [B, T, H, Dv].
      q: [B, T, H, D].
      k: [B, T, K, D].
      v: [B, T, K, Dv].
      segments: int[B, T].

    Returns:
      [B, T, H, Dv], sharded over the mesh in context like q.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(q, k, v, segments)
    # Query heads stay with their key-value heads: they are split only if these can be.
    split = k.shape[2] % devices_along("kv_heads") == 0
    axes = ("batch", None, "heads" if split else None, None)
    q_spec, k_spec, v_spec, segment_spec = (
        even_spec(axes[: x.ndim], x.shape, mesh.shape) for x in (q, k, v, segments)
    )
    return jax.shard_map(
        kernel,
        mesh=mesh,
        in_specs=(q_spec, k_spec, v_spec, segment_spec),
        out_specs=q_spec,
        check_vma=False,  # a kernel does not declare over which axes its output varies
    )(q, k, v, segments)


def _not_self_attention(q: jax.Array, k: jax.Array, offset: jax.Array | int) -> str:
    same = q.shape[1] == k.shape[1] and isinstance(offset, int) and offset == 0
    return "" if same else "queries and keys belong to different tokens"


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    offset: jax.Array | int,
    scale: float,
) -> jax.Array:
    """Attention of a whole sequence [B, T, H, D] with the splash kernel of jax: for TPUs.

    Source: jax.experimental.pallas.ops.tpu.splash_attention.
    """
    if refusal := _not_self_attention(q, k, offset):
        _log_once(f"attention: blockwise instead of splash: {refusal}")
        out = blockwise_attention(q, k, v, q_segments, kv_segments, offset, scale)
        return checkpoint_name(out, "attention")
    kernel = functools.partial(splash_self_attention, scale=scale)
    return on_each_device(kernel, q, k, v, q_segments)


def splash_self_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    *,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """Runs the splash kernel on one device.

    Args:
      q: [B, T, H, D].
      k: [B, T, K, D].
      v: [B, T, K, Dv].
      segments: int[B, T].
      scale: factor on the scores.
      interpret: runs the kernel in interpret mode, on any device.

    Returns:
      [B, T, H, Dv] in the dtype of q.
    """
    # Imported here because it is experimental and only needed on a TPU.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    t, heads = q.shape[1:3]
    # Padding to a multiple of the lanes is a separate segment (id −1) at the end of the row, so
    # that no other token attends to it.
    pad = -t % SPLASH_LANES
    length = t + pad
    q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q, k, v))
    segments = jnp.pad(segments, ((0, 0), (0, pad)), constant_values=-1)
    sizes = range(SPLASH_LANES, min(SPLASH_BLOCK, length) + 1, SPLASH_LANES)
    block = max(size for size in sizes if length % size == 0)
    # The fused backward kernel would hold a partial dq for every block of keys.
    blocks = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((length, length))] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    heads_first = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    out: Any = jax.vmap(kernel)(*heads_first, splash.SegmentIds(segments, segments))
    return out.transpose(0, 2, 1, 3)[:, :t].astype(q.dtype)


def cudnn_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    offset: jax.Array | int,
    scale: float,
) -> jax.Array:
    """Attention of a whole sequence [B, T, H, D] with cuDNN: for NVIDIA GPUs from Hopper on.

    The number of segments is known at run time only: a batch with a row of more than
    `CUDNN_SEGMENTS` segments is computed blockwise.
    """
    if refusal := _not_self_attention(q, k, offset) or _cudnn_refusal(q, v):
        _log_once(f"attention: blockwise instead of cuDNN: {refusal}")
        return blockwise_attention(q, k, v, q_segments, kv_segments, offset, scale)

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        starts, lengths, fits = segment_extents(segments, CUDNN_SEGMENTS)
        return lax.cond(
            fits,
            lambda: _cudnn_packed(q, k, v, starts, lengths, scale),
            lambda: blockwise_attention(q, k, v, segments, segments, 0, scale),
        )

    return on_each_device(kernel, q, k, v, q_segments)


def _cudnn_refusal(q: jax.Array, v: jax.Array) -> str:
    """Returns why cuDNN does not support these arrays [B, T, H, D], or an empty string."""
    kernels = cudnn()
    if kernels is None:
        return "this version of jax gives no access to it"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it does not support {q.dtype}"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] > 128 or q.shape[-1] % 8:
        return f"it does not support head dimensions {q.shape[-1]} and {v.shape[-1]}"
    # Devices of other vendors have none, or a name such as "gfx90a".
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    if not re.fullmatch(r"\d+\.\d+", capability) or float(capability) < 9.0:
        return "packed segments need compute capability 9.0"
    try:
        kernels.check_cudnn_version()
    except RuntimeError as error:
        return str(error)
    return ""


def segment_extents(segments: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the extents of the segments in each row; padding counts as a segment.

    Args:
      segments: int[B, T].
      most: maximum number of segments per row.

    Returns:
      (index of the first token of each segment int32[B, most], lengths int32[B, most], whether
      every row has at most `most` segments: bool scalar). Entries past the last segment are -1.
    """
    t = segments.shape[1]
    first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    index = jnp.arange(t, dtype=jnp.int32)
    # Sorting moves the indices of first tokens to the front, followed by t for all other tokens.
    # The length of a segment is then the difference to the next entry, also for the last one.
    starts = jnp.sort(jnp.where(first, index, t), axis=1)
    starts = jnp.pad(starts, ((0, 0), (0, max(0, most + 1 - t))), constant_values=t)
    lengths = starts[:, 1 : most + 1] - starts[:, :most]
    absent = starts[:, :most] == t
    fits = jnp.all(jnp.sum(first, axis=1) <= most)
    return jnp.where(absent, -1, starts[:, :most]), jnp.where(absent, -1, lengths), fits


def _cudnn_packed(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    scale: float,
) -> jax.Array:
    """Calls cuDNN with q, k, v [B, T, H or K, D] and the segments from `segment_extents`."""
    kernels = cudnn()
    assert kernels is not None  # `_cudnn_refusal` has checked
    # JAX derives the strides of keys and values from the heads of q, so the numbers must be equal.
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    offsets = jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)
    out: Any = kernels.dot_product_attention(
        q,
        k,
        v,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=scale,
        mask_type=kernels.MaskType.PADDING_CAUSAL,
    )
    return out
