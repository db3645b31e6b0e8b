"""Arguments of the Python interface and of commands: a wrong one is an error of one short line."""

import math

import numpy as np
import pytest

import jaxtune
from jaxtune import Callback, Sampling
from jaxtune.atomic_files import refuse_taken
from jaxtune.checkpoints.huggingface import open_source
from jaxtune.errors import JaxtuneError
from jaxtune.planning.topology import find_topology
from jaxtune.training.loop.callbacks import check_callbacks

PATHS = (5, None, "a\0b", "\ud800", "x" * 300, "x/" * 3000)


@pytest.fixture(scope="module")
def model(tiny_chat):
    return jaxtune.load(tiny_chat, dtype="float32", progress=False)


def refusal(call, *arguments, **keywords):
    with pytest.raises(JaxtuneError) as error:
        call(*arguments, **keywords)
    message = str(error.value)
    message.encode()
    assert "\n" not in message and len(message) < 400
    return message


GENERATE = [
    ({"stop": 5}, "stop is a text that ends an answer"),
    ({"stop": [5]}, "stop=5 is not a text"),
    ({"temperature": "hot"}, "temperature='hot' is not a finite number"),
    ({"temperature": math.nan}, "temperature=nan is not a finite number"),
    ({"temperature": -1}, "temperature=-1 is not"),
    ({"temperature": 10**400}, "temperature=an integer of 1329 bits is not"),
    ({"seed": "x"}, "seed='x' is not within"),
    ({"seed": 1.5}, "seed=1.5 is not within"),
    ({"top_p": None}, "top_p=None is not within"),
    ({"top_k": "x"}, "top_k='x' is not a number of tokens"),
    ({"max_new_tokens": 2**63}, "max_new_tokens=9223372036854775808 is not a number of tokens"),
    ({"skip_special_tokens": "x"}, "skip_special_tokens is True or False, not 'x'"),
    ({"prompts": 5}, "prompts is a prompt or a list of prompts, not 5"),
    ({"prompts": [None]}, "a prompt is text, a list of token ids or a list of chat messages"),
    ({"prompts": "\ud800"}, "the prompt has an unpaired surrogate: '\\ud800'"),
]


@pytest.mark.parametrize(("arguments", "message"), GENERATE)
def test_arguments_of_generate(model, arguments, message):
    assert refusal(model.generate, **{"prompts": "x", **arguments}).startswith(message)


def test_arguments_of_other_methods_of_a_model(model):
    for prompt in (5, None, 1.5, object()):
        assert refusal(model.encode, prompt).startswith("a prompt is text, a list of token ids")
    generation = model.generation([[1, 2]], 3, Sampling())
    assert refusal(generation.end, 99) == "there is no row 99: rows are 0 to 0"
    assert refusal(generation.end, "x").startswith("row is the number of a prompt, not 'x'")
    refusal(model.generation, 5, 3, Sampling())
    refusal(model.generation, [[1]], 3, 5)
    refusal(model.generation, [[1]], 3, Sampling(), stop=5)
    refusal(model.generation, [[1]], 3, Sampling(), largest_chunk=0)
    for positions in ([[2**40]], [[-1]], [[1.5]], [["x"]]):
        assert "positions must be integers" in refusal(model.logits, [[1]], positions=positions)
    for directory in PATHS:
        assert refusal(model.save_pretrained, directory).startswith("directory ")


def test_weights_of_adapters_are_finite_numbers(model):
    for weight in ("a", None, [1], math.nan, math.inf, 10**400, True):
        assert "weight of 'x'" in refusal(model.use, {"x": weight})
    for choice in (5, ["x"], {1}):
        assert "adapter is a name, weights by name or None" in refusal(model.use, choice)


def test_arguments_of_load(tiny_chat):
    for name, value in (
        *(("quantize", 5), ("quantize", ["nf4"]), ("quantize", np.array([])), ("mesh", 5)),
        *(("dtype", 5), ("dtype", ["x"])),
        *(("adapter", 5), ("adapters", ["x"]), ("adapters", {"x": 5}), ("chat_template", 5)),
        *(("revision", 5), ("attention", 5)),
    ):
        assert name in refusal(jaxtune.load, tiny_chat, progress=False, **{name: value})
    for path in PATHS:
        assert refusal(jaxtune.load, path).startswith("path ")
        assert refusal(jaxtune.Run, path).startswith("workdir ")
    assert refusal(jaxtune.convert, np.array([]), "unused").startswith("path ")
    assert "vocab_size" in refusal(jaxtune.convert, tiny_chat, "unused", vocab_size="x")


def test_a_run_is_neither_a_checkpoint_nor_an_adapter(tiny_chat, tmp_path):
    run = tmp_path / "run"
    config = jaxtune.config.resolve({"model": {"path": str(tiny_chat)}})
    (run / "adapter" / "last").mkdir(parents=True)
    (run / "config.json").write_text(config.to_json())
    assert f"jaxtune generate --workdir {run}" in refusal(open_source, run)
    message = refusal(jaxtune.load, tiny_chat, adapter=run, progress=False)
    assert message.startswith(f"{run}: a run, not an adapter: use {run}/adapter/best")
    for which in ("first", {}, None):
        assert refusal(jaxtune.Run(run).adapter_directory, which).startswith("adapter=")
    for keys in (5, [5], True):
        message = refusal(jaxtune.train, None, run, accept_changes=keys, progress=False)
        assert message.startswith("accept_changes is a list of keys")


def test_an_output_directory_that_cannot_be_created_is_refused_first(tmp_path):
    (tmp_path / "file").write_text("")
    message = refusal(refuse_taken, tmp_path / "file" / "a" / "b")
    assert message.endswith(f"cannot create: {tmp_path / 'file'} is not a directory")
    assert "contains a NUL character" in refusal(refuse_taken, "a\0")


class Misspelled(Callback):
    def on_setp(self, event):
        """Never called."""


class WithoutEvent(Callback):
    def on_step(self):  # type: ignore[override]
        """Cannot be called with an event."""


class NoMethod(Callback):
    on_step = 5  # type: ignore[assignment]


def test_callbacks_that_would_not_be_called():
    assert 'on_setp is not an event; did you mean "on_step"?' in refusal(
        check_callbacks, [Misspelled()]
    )
    for callback in (WithoutEvent(), NoMethod()):
        assert "on_step takes one argument, the event" in refusal(check_callbacks, [callback])
    refusal(check_callbacks, [Misspelled])


def test_rows_in_memory_of_another_type(tiny_chat, tmp_path):
    import pandas

    rows = [{"prompt": "a", "completion": "b"}]
    config = {"model": {"path": str(tiny_chat)}}

    def train(**data):
        return refusal(jaxtune.train, config, tmp_path / "run", progress=False, **data)

    assert 'is a DataFrame: pass its rows, .to_dict("records")' in train(
        train_data=pandas.DataFrame(rows)
    )
    assert "not generator" in train(train_data=(row for row in rows))
    assert "eval_data is an empty dict" in train(train_data=rows, eval_data={})
    assert "row 0: keys are texts, not 1" in train(train_data=[{1: 2}])
    assert "row 0: the keys prompt match no" in train(
        train_data=[{"prompt": "x", "completion": None}]
    )


@pytest.mark.parametrize(
    "name", ["8xh1000", "v5e:0x0", "v5e:99999999x99999999", "h100:99999999999999999999", "h100:0"]
)
def test_a_topology_that_does_not_exist(name):
    assert name[:12].partition(":")[0] in refusal(find_topology, name)
