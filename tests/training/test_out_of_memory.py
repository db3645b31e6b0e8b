"""Running out of memory is one line that says what to change."""

import json

import jax
import jax.numpy as jnp
import pytest

from jaxtune.adapters import method_from_config
from jaxtune.config import resolve
from jaxtune.errors import JaxtuneError
from jaxtune.training.out_of_memory import explain, out_of_memory_named, remedies
from jaxtune.training.setup import set_up


def prepared(model, **training):
    sections = {"training": {"batch_size": 8} | training, "model": {"path": str(model)}}
    config = resolve(sections)
    real = json.loads((model / "config.json").read_text())
    return set_up(config, real, method_from_config(config.adapter), jax.devices()[:1])


def test_an_allocation_that_fails_is_named_with_what_to_change(tiny):
    setup = prepared(tiny("llama"))
    with pytest.raises(JaxtuneError) as error, out_of_memory_named(setup):
        jax.block_until_ready(jnp.zeros((1 << 24, 1 << 24)))
    text = str(error.value)
    assert "\n" not in text
    assert "out of memory, 1048576.00 GiB more were needed, a device has" in text
    assert "change first: training.accumulation=2, which saves about" in text
    assert "then quantize.format=nf4, data.max_length=512" in text


def test_another_error_passes(tiny):
    with pytest.raises(ZeroDivisionError), out_of_memory_named(prepared(tiny("llama"))):
        1 / 0  # noqa: B018


@pytest.mark.parametrize(
    ("text", "needed", "limit"),
    [
        (
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2147483648 bytes.",
            "2.00",
            "",
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.",
            "20.50",
            "15.75",
        ),
        ("RESOURCE_EXHAUSTED: Failed to allocate request for 3.50GiB (3758096384B)", "3.50", ""),
    ],
)
def test_the_numbers_are_read_off_what_each_backend_says(text, needed, limit, tiny):
    said = explain(text, prepared(tiny("llama")))
    assert f"{needed} GiB" in said
    assert not limit or f"a device has {limit} GiB" in said


def test_remat_comes_first_where_it_is_off_and_saves_most(tiny):
    first, *_ = remedies(prepared(tiny("llama", num_hidden_layers=8), remat="none"))
    assert first.change == "training.remat=full"
    others = remedies(prepared(tiny("llama", num_hidden_layers=8)))
    assert first.bytes > others[0].bytes > 0
    # One row cannot be split any further.
    assert "accumulation" not in remedies(prepared(tiny("llama"), accumulation=8))[0].change
