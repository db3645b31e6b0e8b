"""Checkpoints with auto_map: exports copy the code they reference, and nothing is run."""

import json
import shutil

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import jaxtune

CONFIGURATION = """
from transformers import LlamaConfig
from .own_sizes import DEFAULT

class OwnConfig(LlamaConfig):
    own = DEFAULT
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
TOKENIZATION = """
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    own = True
"""
# A file that is imported leaves this behind.
TRACE = "import pathlib\npathlib.Path({!r}).touch()\n"


@pytest.fixture
def named(tiny_chat, tmp_path):
    """A checkpoint that transformers opens with code of its own."""
    directory, trace = shutil.copytree(tiny_chat, tmp_path / "model"), tmp_path / "trace"
    code = {
        "configuration_own": CONFIGURATION,
        "own_sizes": "DEFAULT = 7\n",
        "modeling_own": MODELING,
        "tokenization_own": TOKENIZATION,
    }
    for name, text in code.items():
        (directory / f"{name}.py").write_text(TRACE.format(str(trace)) + text)
    change(
        directory / "config.json",
        AutoConfig="configuration_own.OwnConfig",
        AutoModelForCausalLM="modeling_own.OwnModel",
    )
    change(
        directory / "tokenizer_config.json",
        AutoTokenizer=[None, "tokenization_own.OwnTokenizer"],
    )
    return directory, trace


def change(path, **auto_map):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))


def auto_map(directory, name="config.json"):
    return json.loads((directory / name).read_text()).get("auto_map")


def test_exports_hold_the_code_that_they_name(named, tmp_path):
    directory, trace = named
    saved = jaxtune.load(directory, progress=False).save_pretrained(tmp_path / "saved")
    converted = jaxtune.convert(directory, tmp_path / "converted", progress=False)
    assert not trace.exists()
    for written in (saved, converted):
        assert auto_map(written) == auto_map(directory)
        files = {path.name: path.read_bytes() for path in written.glob("*.py")}
        assert files == {path.name: path.read_bytes() for path in directory.glob("*.py")}
        config = AutoConfig.from_pretrained(written, trust_remote_code=True)
        assert (type(config).__name__, config.own) == ("OwnConfig", 7)
        model = AutoModelForCausalLM.from_pretrained(written, trust_remote_code=True)
        assert type(model).__name__ == "OwnModel"
        tokenizer = AutoTokenizer.from_pretrained(written, trust_remote_code=True)
        assert type(tokenizer).__name__ == "OwnTokenizer"
        # The architecture is one of transformers', which opens it without that code as well.
        assert type(AutoModelForCausalLM.from_pretrained(written)).__name__ == "LlamaForCausalLM"


def test_names_without_a_file_are_left_out(named, tmp_path, caplog):
    directory, _ = named
    (directory / "modeling_own.py").unlink()
    (tmp_path / "secret.py").write_text("")
    change(
        directory / "config.json",
        AutoConfig="configuration_own.OwnConfig",
        AutoModelForCausalLM="modeling_own.OwnModel",
        AutoModel="../secret.Own",
        AutoModelForTokenClassification="someone/else--modeling.Model",
    )
    written = jaxtune.convert(directory, tmp_path / "out", progress=False)
    assert auto_map(written) == {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForTokenClassification": "someone/else--modeling.Model",
    }
    left_out = {m for m in caplog.messages if "left out" in m}
    assert {message.split()[1] for message in left_out} == {
        "auto_map.AutoModelForCausalLM",
        "auto_map.AutoModel",
    }
    assert not (written / "secret.py").exists()
    change(directory / "config.json", AutoModelForCausalLM="modeling_own.OwnModel")
    written = jaxtune.convert(directory, tmp_path / "none", progress=False)
    assert auto_map(written) is None
    AutoModelForCausalLM.from_pretrained(written, trust_remote_code=True)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": "a.OwnConfig"}))
    assert auto_map(jaxtune.convert(directory, tmp_path / "text", progress=False)) is None


def test_a_link_out_of_the_checkpoint_is_not_copied(named, tmp_path, caplog):
    directory, _ = named
    secret = tmp_path / "secret.py"
    secret.write_text("KEY = 1\n")
    (directory / "tokenization_own.py").unlink()
    (directory / "tokenization_own.py").symlink_to(secret)
    out = jaxtune.convert(directory, tmp_path / "out", progress=False)
    assert not (out / "tokenization_own.py").exists()
    assert "AutoTokenizer is left out: its Python files are not in" in caplog.text
    assert (out / "modeling_own.py").is_file()


def test_links_of_the_hubs_cache_are_followed(named, tmp_path):
    directory, _ = named
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "c0ffee", tmp_path / "hub" / "blobs"
    shutil.copytree(directory, snapshot)
    blobs.mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(f"../../blobs/{number}")
    out = jaxtune.convert(snapshot, tmp_path / "out", progress=False)
    assert {file.name for file in directory.glob("*.py")} == {
        file.name for file in out.glob("*.py")
    }
