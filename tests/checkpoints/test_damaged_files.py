"""Files beside the weights, special files and files that shrink: one line names the file."""

import json
import os
import shutil
import signal
import socket

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_gguf import write_tiny

import jaxtune
from jaxtune.adapter_files.peft import read_adapter
from jaxtune.checkpoints.chat import adapter_chat, base_chat
from jaxtune.checkpoints.formats.gguf import GGUFSource
from jaxtune.checkpoints.formats.safetensors import SafetensorsFile
from jaxtune.checkpoints.formats.torch_file import TorchFile
from jaxtune.checkpoints.huggingface import open_source
from jaxtune.errors import JaxtuneError


@pytest.fixture
def model(tiny_chat, tmp_path):
    """A copy of a checkpoint with a tokenizer and all files that may come with it."""
    directory = tmp_path / "model"
    shutil.copytree(tiny_chat, directory)
    (directory / "generation_config.json").write_text('{"eos_token_id": 2}')
    (directory / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    (directory / "added_tokens.json").write_text("{}")
    return directory


@pytest.fixture
def no_waiting():
    """Ends a test that waits for a file."""

    def fail(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def read_all(directory):
    source = open_source(directory)
    base = base_chat(directory, source.config)
    adapter_chat(directory, base)
    return base


def refusal(call, *arguments):
    with pytest.raises(JaxtuneError) as raised:
        call(*arguments)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 1000
    return str(raised.value)


def change(path, *keys, value):
    """Replaces a value in a JSON file."""
    content = json.loads(path.read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b"[]", b'"x"', b"{}{}"], ids=repr
)
@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "generation_config.json",
    ],
)
def test_a_file_that_is_not_an_object_is_named(model, name, content):
    (model / name).write_bytes(content)
    assert refusal(read_all, model).startswith(f"{model / name}:")


def test_a_template_that_is_not_text(model):
    (model / "chat_template.jinja").write_bytes(b"\xff\xfe")
    assert refusal(read_all, model).startswith(f"{model / 'chat_template.jinja'}: not UTF-8")


@pytest.mark.parametrize(
    ("name", "keys", "value"),
    [
        ("tokenizer.json", ["added_tokens", 0], 1.5),
        ("tokenizer.json", ["added_tokens", 0, "id"], {}),
        ("tokenizer.json", ["model", "vocab"], [1]),
        ("tokenizer.json", ["model", "merges"], [["a", "zzz"]]),
        ("tokenizer.json", ["pre_tokenizer"], "x"),
        ("tokenizer.json", ["decoder", "type"], 10**30),
        ("tokenizer_config.json", ["tokenizer_class"], [1]),
        ("tokenizer_config.json", ["tokenizer_class"], {}),
        ("tokenizer_config.json", ["model_max_length"], ["x"]),
        ("tokenizer_config.json", ["model_max_length"], "x" * 10**5),
        ("special_tokens_map.json", ["eos_token"], 1.5),
        ("special_tokens_map.json", ["bos_token"], []),
        ("special_tokens_map.json", ["bos_token"], True),
        ("added_tokens.json", ["<x>"], [1]),
        ("added_tokens.json", ["<x>"], None),
    ],
)
def test_a_value_that_keeps_the_tokenizer_from_being_read(model, name, keys, value):
    read_all(model)
    change(model / name, *keys, value=value)
    assert refusal(read_all, model).startswith(f"{model / name}: ")


@pytest.mark.parametrize("value", [{"a": 1}, ["x", 1], "x", 1.5, True, [[]], [None], 10**30])
@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id", "pad_token_id"])
def test_an_id_of_the_generation_config_that_is_not_one(model, key, value):
    (model / "generation_config.json").write_text(json.dumps({key: value}))
    message = f"{model / 'generation_config.json'}: {key}="
    assert refusal(read_all, model).startswith(message)


def test_ids_that_are_valid(model):
    for content in ({"eos_token_id": [2, 3]}, {"eos_token_id": None}, {"pad_token_id": -1}, {}):
        (model / "generation_config.json").write_text(json.dumps(content))
        read_all(model)


def test_an_end_token_of_config_json_that_is_not_one(model):
    change(model / "config.json", "eos_token_id", value={"a": 1})
    assert refusal(read_all, model).startswith(f"{model / 'config.json'}: eos_token_id={{'a': 1}}")


def test_an_end_token_outside_the_vocabulary_is_named_when_generating(model):
    (model / "generation_config.json").write_text('{"eos_token_id": 1000000}')
    loaded = jaxtune.load(model, progress=False)
    message = refusal(lambda: loaded.generate("x", max_new_tokens=1))
    assert "eos_token_id" in message
    assert "1000000" in message


KINDS = ["fifo", "directory", "socket", "device", "loop"]


def put(path, kind):
    """Puts a special file at a path; returns what must be kept open."""
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        bound = socket.socket(socket.AF_UNIX)
        os.chdir(path.parent)  # the length of its address is limited
        bound.bind(path.name)
        return bound
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path)
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_special_files_are_neither_read_nor_waited_for(
    model, kind, no_waiting, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)  # also restores the directory
    refused = ["config.json", "model.safetensors", "generation_config.json"]
    refused += ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt"]
    refused += ["special_tokens_map.json", "added_tokens.json"]
    for index, name in enumerate([*refused, "model.safetensors.index.json"]):
        directory = tmp_path / str(index)
        shutil.copytree(model, directory)
        kept = put(directory / name, kind)
        if name in refused:
            assert str(directory) in refusal(read_all, directory)
        else:
            read_all(directory)
        del kept
    path = tmp_path / "m.gguf"
    kept = put(path, kind)
    assert str(path) in refusal(jaxtune.load, path)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    kept = kept, put(adapter / "adapter_config.json", kind)
    assert refusal(read_adapter, adapter).startswith(str(adapter))


def halve(path):
    os.truncate(path, path.stat().st_size // 2)


def test_a_file_that_shrinks_after_it_was_opened(tiny, tmp_path):
    path = tmp_path / "model.safetensors"
    shutil.copy(tiny("llama") / path.name, path)
    tensors = load_file(path)
    torch_path = tmp_path / "pytorch_model.bin"
    torch.save(tensors, torch_path)
    gguf_path = write_tiny(tmp_path / "m.gguf")
    files = [SafetensorsFile(path), TorchFile(torch_path), GGUFSource(gguf_path)]
    before = [np.array(file.read(file.names()[-1])) for file in files]
    assert all(value.size for value in before)
    for place, file in zip((path, torch_path, gguf_path), files, strict=True):
        halve(place)
        message = refusal(file.read, file.names()[-1])
        assert message.startswith(f"{place}: has become shorter since it was opened")


@pytest.fixture
def sharded(tiny, tmp_path):
    """A checkpoint of several files, and a function that changes its index."""
    directory = jaxtune.convert(tiny("llama"), tmp_path / "sharded", dtype="float32")
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(tensors, directory, max_shard_size="100KB")
    path = directory / "model.safetensors.index.json"

    def edit(function):
        content = json.loads(path.read_text())
        function(content["weight_map"])
        path.write_text(json.dumps(content))
        return directory

    return edit


def test_an_entry_of_the_index_for_a_tensor_that_no_file_holds(sharded, caplog):
    """Such a tensor is missing where it is needed; others, of unused layers, are only reported."""
    jaxtune.load(sharded(lambda entries: None), progress=False)
    first = "model.layers.0.self_attn.q_proj.weight"

    def rename(entries):
        entries["model.layers.9.mlp.up_proj.weight"] = entries[first]

    with caplog.at_level("WARNING"):
        jaxtune.load(sharded(rename), progress=False)
    assert "for 1 tensor(s) that it does not hold, such as model.layers.9.mlp.up" in caplog.text
    config = sharded(lambda entries: None) / "config.json"
    change(config, "num_hidden_layers", value=4)
    message = refusal(lambda: jaxtune.load(config.parent, progress=False))
    assert "does not fit its config: 9 tensor(s) missing: model.layers.3" in message


def test_an_index_that_disagrees_with_the_files(sharded, caplog):
    """The files decide, as in transformers: a tensor is in only one of them."""
    directory = sharded(lambda entries: None)
    before = {n: open_source(directory).read(n).copy() for n in open_source(directory).names()}

    def swap(entries):
        first, *others = entries
        other = next(name for name in others if entries[name] != entries[first])
        entries[first], entries[other] = entries[other], entries[first]

    with caplog.at_level("WARNING"):
        source = open_source(sharded(swap))
    assert "that it does not hold" in caplog.text
    assert all(np.array_equal(source.read(name), value) for name, value in before.items())


def test_a_key_twice_in_the_header_of_safetensors(tiny, tmp_path):
    path = tmp_path / "model.safetensors"
    content = (tiny("llama") / path.name).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    name, entry = next((n, e) for n, e in json.loads(header).items() if n != "__metadata__")
    for other in (entry, entry | {"shape": [1]}, entry | {"data_offsets": [0, 2**40]}):
        text = b'{"%s":%s,' % (name.encode(), json.dumps(other).encode()) + header[1:]
        text += b" " * (-len(text) % 8)
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
        message = refusal(SafetensorsFile, path)
        assert message.startswith(f"{path}: ")
        assert "duplicate key" in message or "not a valid safetensors file" in message


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_a_link_to_nothing_is_not_an_absent_file(model, name):
    (model / name).unlink()
    (model / name).symlink_to(model / "blob")
    with pytest.raises(JaxtuneError, match=name):
        base_chat(model, {})


def test_a_tokenizer_is_not_read_beyond_the_limit(model):
    with (model / "tokenizer.json").open("r+b") as file:
        file.truncate(2**32)  # a sparse file
    with pytest.raises(JaxtuneError, match=r"tokenizer.json: larger than 32 MiB"):
        base_chat(model, {})
