"""Directories with the same weights in two forms: equal ones are read, others rejected."""

import json
import logging
import shutil

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from jaxtune.adapter_files.peft import read_adapter
from jaxtune.checkpoints.huggingface import HuggingFaceSource
from jaxtune.checkpoints.tokenizer import load_tokenizer
from jaxtune.errors import JaxtuneError

NAMES = {
    "safetensors": ("model.safetensors", "model.safetensors.index.json"),
    "torch": ("pytorch_model.bin", "pytorch_model.bin.index.json"),
}


@pytest.fixture(scope="module")
def values(tiny):
    """Two checkpoints of one shape."""
    return [load_file(tiny("llama", seed=seed) / "model.safetensors") for seed in (0, 1)]


@pytest.fixture
def place(tiny, tmp_path):
    """A directory without weights, and a function that writes weights into it."""
    directory = tmp_path / "model"
    shutil.copytree(tiny("llama"), directory, ignore=shutil.ignore_patterns("*.safetensors"))

    def write(tensors, form, size="5GB"):
        """Leaves what is there, as somebody's copying of files would."""
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        safe = form == "safetensors"
        save_torch_state_dict(tensors, scratch, max_shard_size=size, safe_serialization=safe)
        shutil.copytree(scratch, directory, dirs_exist_ok=True)
        shutil.rmtree(scratch)
        return directory

    return write


def refusal(directory):
    with pytest.raises(JaxtuneError) as raised:
        HuggingFaceSource(directory)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def holds(directory, tensors):
    source = HuggingFaceSource(directory)
    return set(source.names()) == set(tensors) and all(
        source.read(name).tobytes() == value.numpy().tobytes() for name, value in tensors.items()
    )


def transformers_holds(directory, tensors):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
    return all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("form", NAMES)
class TestOneFileBesideAnIndex:
    def test_both_disagree(self, place, values, form):
        place(values[0], form, "100KB")
        directory = place(values[1], form)
        whole, index = NAMES[form]
        assert (directory / index).is_file()
        assert transformers_holds(directory, values[1])  # and not what the index names
        assert refusal(directory).startswith(
            f'{directory}: holds {whole} and {index}, which differ in "'
        )
        assert refusal(directory).endswith('": remove the one that is out of date')
        (directory / index).unlink()
        assert holds(directory, values[1])

    def test_both_agree(self, place, values, form):
        place(values[0], form, "100KB")
        assert holds(place(values[0], form), values[0])

    def test_both_differ_in_one_value_of_the_last_tensor(self, place, values, form):
        place(values[0], form, "100KB")
        last = list(values[0])[-1]
        changed = values[0][last].clone()
        changed.view(-1)[-1] += 1
        directory = place(values[0] | {last: changed}, form)
        assert f'which differ in "{last}"' in refusal(directory)

    def test_files_of_the_index_are_missing(self, place, values, form):
        directory = place(values[0], form, "100KB")
        for path in directory.glob("*-of-*"):
            path.unlink()
        place(values[0], form)
        whole, index = NAMES[form]
        assert f"holds {whole} and {index}, which lists the missing file " in refusal(directory)
        assert "which lists the missing file" in refusal(directory)

    def test_the_index_lists_that_file(self, place, values, form):
        directory = place(values[0], form)
        whole, index = NAMES[form]
        content = {"metadata": {}, "weight_map": dict.fromkeys(values[0], whole)}
        (directory / index).write_text(json.dumps(content))
        assert holds(directory, values[0])
        content["weight_map"]["more"] = whole
        (directory / index).write_text(json.dumps(content))
        assert 'which differ in "more"' in refusal(directory)

    def test_files_that_the_index_does_not_name_are_named(self, place, values, form, caplog):
        place(values[1], form, "60KB")
        (place(values[1], form, "60KB") / NAMES[form][1]).unlink()
        directory = place(values[0], form, "100KB")
        with caplog.at_level(logging.WARNING):
            assert holds(directory, values[0])
        assert transformers_holds(directory, values[0])
        assert "does not list " in caplog.text
        assert "so they are not read" in caplog.text

    def test_an_index_that_names_another_file_than_has_the_tensor(
        self, place, values, form, caplog
    ):
        directory = place(values[0], form, "100KB")
        path = directory / NAMES[form][1]
        index = json.loads(path.read_text())
        files = sorted(set(index["weight_map"].values()))
        name = next(n for n, file in index["weight_map"].items() if file == files[0])
        index["weight_map"][name] = files[1]
        path.write_text(json.dumps(index))
        with caplog.at_level(logging.WARNING):
            assert holds(directory, values[0])
        assert f"lists {files[1]} for 1 tensor(s) that it does not hold, such as {name}" in (
            caplog.text
        )


def test_safetensors_are_preferred_as_in_transformers(place, values, caplog):
    place(values[1], "torch", "100KB")
    directory = place(values[0], "safetensors")
    with caplog.at_level(logging.INFO):
        assert holds(directory, values[0])
    assert transformers_holds(directory, values[0])
    assert "reading the .safetensors files, as transformers does, and ignoring the .bin" in (
        caplog.text
    )


def test_an_adapter_in_two_forms(tmp_path):
    tensors = {"a": torch.ones(2, 3), "b": torch.zeros(4)}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "adapter_model.bin")
    assert set(read_adapter(tmp_path).tensors) == {"a", "b"}
    for changed in (tensors | {"b": torch.ones(4)}, {"a": tensors["a"]}):
        torch.save(changed, tmp_path / "adapter_model.bin")
        with pytest.raises(JaxtuneError) as raised:
            read_adapter(tmp_path)
        assert str(raised.value) == (
            f"{tmp_path}: holds adapter_model.safetensors and adapter_model.bin, which differ in "
            '"b": remove the one that is out of date'
        )
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(JaxtuneError, match="but the second cannot be compared: remove the one"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("several", [False, True])
def test_two_chat_templates(tiny_chat, tmp_path, caplog, several):
    directory = shutil.copytree(tiny_chat, tmp_path / "model")
    file, settings = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    for stored, differs in ((file.read_text() + "\n", False), ("{{ 'old' }}", True)):
        template = [{"name": "default", "template": stored}] if several else stored
        settings.write_text(json.dumps(content | {"chat_template": template}))
        with caplog.at_level(logging.WARNING):
            tokenizer = load_tokenizer(directory)
        theirs = AutoTokenizer.from_pretrained(directory).chat_template
        assert tokenizer is not None
        assert tokenizer.chat_template == theirs == file.read_text()
        assert ("have different chat templates" in caplog.text) == differs
