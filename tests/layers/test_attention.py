import logging
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxtune.errors import JaxtuneError
from jaxtune.layers import attention_kernels
from jaxtune.layers.attention import BACKENDS, attention, choose_backend
from jaxtune.layers.attention_kernels import segment_extents, splash_self_attention

pytestmark = pytest.mark.usefixtures("compiled_fully")

# Float32 sums of about 300 products in another order.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def packed_rows(t: int) -> np.ndarray:
    """Two rows: three segments and padding behind them, and padding in front of one segment."""
    index = np.arange(t)
    first = np.select([index < t // 5, index < t // 2, index < t - 7], [1, 2, 3], 0)
    return np.stack([first, (index >= 11).astype(int)]).astype(np.int32)


def drawn(t: int, heads: int, kv_heads: int, dim: int, dtype=np.float32) -> list[np.ndarray]:
    """Returns q, k, v and a cotangent of the result."""
    rng = np.random.default_rng(0)
    shapes = [(2, t, heads, dim), (2, t, kv_heads, dim), (2, t, kv_heads, dim), (2, t, heads, dim)]
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def torch_attention(q, k, v, g, segments):
    """Returns the result and the gradients of torch's attention under the same mask."""
    t = segments.shape[1]
    mask = np.tril(np.ones((t, t), bool)) & (segments[:, :, None] == segments[:, None, :])
    leaves = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in leaves),
        attn_mask=torch.tensor(mask[:, None]),
        enable_gqa=True,
    ).transpose(1, 2)
    out.backward(torch.tensor(g))
    return [out.detach().numpy(), *(x.grad.numpy() for x in leaves)]


def with_gradients(function, q, k, v, g):
    """Returns the result and the gradients of `function`."""
    out, pullback = jax.vjp(function, *map(jnp.asarray, (q, k, v)))
    return [np.asarray(x, np.float32) for x in (out, *pullback(jnp.asarray(g, out.dtype)))]


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("backend", ["xla", "blockwise"])
def test_agrees_with_torch_on_packed_rows(backend, heads, kv_heads):
    t, dim = 300, 16  # two blocks of queries, the second one partly empty
    segments = packed_rows(t)
    q, k, v, g = drawn(t, heads, kv_heads, dim)

    def ours(q, k, v):
        options = {"q_segments": segments, "kv_segments": segments, "scale": dim**-0.5}
        return attention(q, k, v, **options, backend=backend)

    for mine, theirs in zip(
        with_gradients(ours, q, k, v, g), torch_attention(q, k, v, g, segments), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, **TOLERANCE)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("backend", ["xla", "blockwise"])
def test_every_segment_sees_a_prefix_and_padding_does_not(backend, heads, kv_heads):
    t, n, dim = 300, 7, 16
    segments = packed_rows(t)
    q, k, v, g = drawn(t, heads, kv_heads, dim)
    prefix = np.random.default_rng(1).standard_normal((2, n, kv_heads, dim)).astype(np.float32)

    def ours(q, prefix):
        options = {"q_segments": segments, "kv_segments": segments, "scale": dim**-0.5}
        return attention(q, k, v, **options, backend=backend, prefix=(prefix[0], prefix[1]))

    out, pullback = jax.vjp(ours, jnp.asarray(q), jnp.asarray(prefix))
    seen = (segments != 0)[..., None, None]
    d_q, d_prefix = pullback(jnp.asarray(np.where(seen, g, 0)))
    mask = np.tril(np.ones((t, t), bool)) & (segments[:, :, None] == segments[:, None, :])
    mask = np.concatenate([np.repeat((segments != 0)[..., None], n, axis=2), mask], axis=2)
    q_, prefix_ = (torch.tensor(x, requires_grad=True) for x in (q, prefix))
    joined = (
        torch.cat([p[None].expand(2, -1, -1, -1), torch.tensor(x)], dim=1).transpose(1, 2)
        for p, x in zip(prefix_, (k, v), strict=True)
    )
    theirs = torch.nn.functional.scaled_dot_product_attention(
        q_.transpose(1, 2), *joined, attn_mask=torch.tensor(mask[:, None]), enable_gqa=True
    ).transpose(1, 2)
    theirs.backward(torch.tensor(np.where(seen, g, 0)))
    expected = np.where(seen, theirs.detach().numpy(), 0)
    np.testing.assert_allclose(np.where(seen, out, 0), expected, **TOLERANCE)
    np.testing.assert_allclose(d_q, q_.grad.numpy(), **TOLERANCE)
    # Each value of a prefix sums over every token that sees it.
    np.testing.assert_allclose(d_prefix, prefix_.grad.numpy(), rtol=1e-4, atol=2e-4)


def test_splash_kernel_agrees_with_torch():
    t, dim = 130, 64  # padded to two tiles
    segments = packed_rows(t)
    q, k, v, g = drawn(t, 2, 1, dim)

    def ours(q, k, v):
        return splash_self_attention(q, k, v, segments, scale=dim**-0.5, interpret=True)

    for mine, theirs in zip(
        with_gradients(ours, q, k, v, g), torch_attention(q, k, v, g, segments), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, **TOLERANCE)


def test_one_query_on_a_cache_is_the_last_row_of_the_whole():
    t, at, dim = 24, 17, 8
    segments = np.ones((2, t), np.int32)
    q, k, v, _ = drawn(t, 4, 2, dim)
    whole = attention(q, k, v, q_segments=segments, kv_segments=segments, scale=0.3, backend="xla")
    one = attention(
        q[:, at : at + 1],
        k,
        v,
        q_segments=segments[:, :1],
        kv_segments=segments,
        offset=jnp.int32(at),
        scale=0.3,
        backend="blockwise",
    )
    np.testing.assert_allclose(one[:, 0], whole[:, at], **TOLERANCE)


@pytest.mark.parametrize("backend, name", [("cudnn", "cuDNN"), ("splash", "splash")])
def test_unsupported_inputs_of_a_kernel_are_computed_blockwise_and_logged_once(
    backend, name, caplog
):
    attention_kernels._log_once.cache_clear()
    t, keys, dim = 5, 9, 8
    segments = np.ones((2, keys), np.int32)
    q, k, v, _ = drawn(keys, 4, 2, dim)
    arguments = (q[:, :t], k, v, segments[:, :t], segments, jnp.int32(4), 0.3)
    with caplog.at_level(logging.WARNING):
        results = [BACKENDS[backend](*arguments) for _ in range(2)]
    np.testing.assert_array_equal(results[0], BACKENDS["blockwise"](*arguments))
    assert [record.message for record in caplog.records] == [
        f"attention: blockwise instead of {name}: queries and keys belong to different tokens"
    ]


def test_cudnn_refuses_float32():
    attention_kernels._log_once.cache_clear()
    q, k, v, _ = drawn(6, 2, 2, 8)
    segments = np.ones((2, 6), np.int32)
    assert "float32" in attention_kernels._cudnn_refusal(jnp.asarray(q), jnp.asarray(v))
    out = BACKENDS["cudnn"](jnp.asarray(q), k, v, segments, segments, 0, 0.3)
    np.testing.assert_allclose(
        out, BACKENDS["xla"](q, k, v, segments, segments, 0, 0.3), **TOLERANCE
    )


def test_segment_extents_lists_every_piece_of_a_row():
    segments = jnp.array([[1, 1, 2, 2, 2, 0], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    starts, lengths, fits = segment_extents(segments, 4)
    np.testing.assert_array_equal(starts, [[0, 2, 5, -1], [0, 2, -1, -1], [0, -1, -1, -1]])
    np.testing.assert_array_equal(lengths, [[2, 3, 1, -1], [2, 4, -1, -1], [6, -1, -1, -1]])
    assert fits
    assert not segment_extents(segments, 2)[2]
    assert segment_extents(segments, 9)[0].shape == (3, 9)  # more than there are tokens


def test_blockwise_never_holds_every_score():
    t, heads = 4096, 4

    def temporaries(backend):
        def loss(q, k, v, segments):
            return BACKENDS[backend](q, k, v, segments, segments, 0, 1.0).sum()

        x = jax.ShapeDtypeStruct((1, t, heads, 64), jnp.float32)
        segments = jax.ShapeDtypeStruct((1, t), jnp.int32)
        gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
        return gradient.lower(x, x, x, segments).compile().memory_analysis().temp_size_in_bytes

    scores = heads * t * t * 4
    assert temporaries("xla") > scores
    assert temporaries("blockwise") < scores / 2


def test_kernels_are_split_over_rows_and_heads():
    # The number of CPU devices is fixed when jax starts.
    program = """
        import functools
        import jax, jax.numpy as jnp, numpy as np
        from jaxtune.layers.attention_kernels import on_each_device, splash_self_attention
        from jaxtune.parallel.mesh import make_mesh

        rng = np.random.default_rng(0)
        q = jnp.asarray(rng.standard_normal((4, 128, 4, 32)), jnp.float32)
        k, v = (jnp.asarray(rng.standard_normal((4, 128, 2, 32)), jnp.float32) for _ in range(2))
        segments = jnp.asarray(np.arange(128)[None] // np.array([[128], [50], [64], [9]]))
        kernel = functools.partial(splash_self_attention, scale=0.2, interpret=True)
        gradient = jax.grad(lambda f, *a: f(*a).sum() ** 2, (1, 2, 3), allow_int=True)
        alone = [kernel(q, k, v, segments), *gradient(kernel, q, k, v, segments)]
        mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 2, "expert": 1, "sequence": 1})
        split = functools.partial(on_each_device, kernel)
        with jax.set_mesh(mesh):
            f = jax.jit(split)
            assert len(f(q, k, v, segments).addressable_shards[0].data) == 2
            together = [f(q, k, v, segments), *jax.jit(gradient, static_argnums=0)(
                split, q, k, v, segments)]
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)
    """
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "4",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_platform_decides_and_a_wrong_choice_is_an_error():
    assert choose_backend("auto", "cpu") == "xla"
    assert choose_backend("auto", "tpu") == "splash"
    assert choose_backend("auto", "gpu") == "cudnn"
    assert choose_backend("auto", "anything else") == "blockwise"
    assert choose_backend("blockwise", "tpu") == "blockwise"
    assert choose_backend("auto", "tpu", prefix=True) == "blockwise"
    assert choose_backend("auto", "cpu", prefix=True) == "xla"
    with pytest.raises(JaxtuneError, match='does not support a prefix; use "blockwise"'):
        choose_backend("splash", "tpu", prefix=True)
    with pytest.raises(JaxtuneError, match=r'model\.attention="splash" runs on tpu, not on cpu'):
        choose_backend("splash", "cpu")
    with pytest.raises(JaxtuneError, match='did you mean "splash"'):
        choose_backend("splish", "tpu")
