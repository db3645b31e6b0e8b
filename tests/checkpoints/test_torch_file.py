"""PyTorch's checkpoints: files of torch, transformers and PEFT are read bit for bit."""

import json
import shutil
import time
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import jaxtune
from jaxtune import config as config_module
from jaxtune.adapter_files.peft import read_adapter
from jaxtune.checkpoints.formats.torch_file import TorchFile
from jaxtune.checkpoints.huggingface import HuggingFaceSource
from jaxtune.errors import JaxtuneError
from jaxtune.planning.plan import model_config

INDEX = "pytorch_model.bin.index.json"
SHARD_SIZES = {
    "llama": "100KB",  # as DeepSeek-LLM is: several files and an index
    "qwen2": "5GB",
    "deepseek": "200KB",
}


def raw(tensor):
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def assert_reads(path, expected):
    file = TorchFile(path)
    assert set(file.names()) == set(expected)
    for name, tensor in expected.items():
        value = file.read(name)
        assert value.shape == file.shape(name) == tuple(tensor.shape), name
        assert str(value.dtype) == str(file.dtype(name)) == str(tensor.dtype).split(".")[1]
        assert value.tobytes() == raw(tensor), name
        assert value.flags.c_contiguous, name
        assert not value.flags.writeable, name


def state_dict():
    """Everything that an ordinary state dict may hold."""
    torch.manual_seed(0)
    values = torch.randn(6, 8)
    weight = torch.nn.Parameter(torch.randn(4, 4, dtype=torch.bfloat16))
    return OrderedDict(
        values=values,
        transposed=values.t(),
        view=values[2:4, 1:],
        step=values[::2, ::3],
        expanded=torch.ones(1).expand(16),
        parameter=weight,
        tied=weight,
        half=torch.randn(3, 5).half(),
        double=torch.randn(2).double(),
        float8=torch.randn(8).to(torch.float8_e4m3fn),
        other_float8=torch.randn(8).to(torch.float8_e5m2),
        scalar=torch.tensor(3.0),
        empty=torch.zeros(0, 7),
        flags=torch.tensor([True, False]),
        integers=torch.arange(5),
        bytes=torch.arange(7, dtype=torch.uint8),
    )


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_what_torch_wrote_bit_for_bit(tmp_path, protocol):
    torch.save(state_dict(), tmp_path / "f.bin", pickle_protocol=protocol)
    assert_reads(tmp_path / "f.bin", state_dict())
    assert TorchFile(tmp_path / "f.bin").read("values", slice(1, 3)).tobytes() == raw(
        state_dict()["values"][1:3]
    )
    assert TorchFile(tmp_path / "f.bin").read("transposed", slice(1, 3)).tobytes() == raw(
        state_dict()["transposed"][1:3]
    )


def test_the_state_dict_of_a_module_has_attributes_that_are_dropped(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    assert hasattr(module.state_dict(), "_metadata")
    torch.save(module.state_dict(), tmp_path / "f.bin")
    assert_reads(tmp_path / "f.bin", module.state_dict())


def test_a_file_without_checksums(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state_dict(), tmp_path / "f.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_reads(tmp_path / "f.bin", state_dict())


def test_a_file_written_by_another_zip_program(tmp_path):
    """Without `byteorder`, as torch wrote up to 2.0, and with values at odd places."""
    torch.save(state_dict(), tmp_path / "f.bin")
    with (
        zipfile.ZipFile(tmp_path / "f.bin") as old,
        zipfile.ZipFile(tmp_path / "g.bin", "w") as new,
    ):
        for number, name in enumerate(old.namelist()):
            if not name.endswith(("byteorder", ".format_version", ".storage_alignment")):
                content = old.read(name)
                with new.open(name, "w", force_zip64=number % 2 == 0) as member:
                    member.write(content)
    assert_reads(tmp_path / "g.bin", state_dict())


@pytest.fixture(scope="module")
def both(tiny, families, tmp_path_factory):
    """Makes the same checkpoint as safetensors and as PyTorch's files."""
    made = {}

    def make(model_type, dtype):
        if (model_type, dtype) not in made:
            source = (families if model_type == "deepseek" else tiny)(model_type)
            directory = tmp_path_factory.mktemp(f"{model_type}-{dtype}")
            safe, theirs = directory / "safe", directory / "torch"
            for target in (safe, theirs):
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
            tensors = {
                name: value.to(getattr(torch, dtype))
                for file in source.glob("*.safetensors")
                for name, value in load_file(file).items()
            }
            save_file(tensors, safe / "model.safetensors", {"format": "pt"})
            size = SHARD_SIZES[model_type]
            save_torch_state_dict(tensors, theirs, max_shard_size=size, safe_serialization=False)
            made[model_type, dtype] = safe, theirs
        return made[model_type, dtype]

    return make


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [("llama", "bfloat16"), ("qwen2", "float32"), ("deepseek", "float16")],
)
def test_a_checkpoint_is_that_of_safetensors(both, model_type, dtype, tmp_path):
    safe, theirs = both(model_type, dtype)
    assert (theirs / INDEX).is_file() == (model_type != "qwen2")
    one, other = HuggingFaceSource(safe), HuggingFaceSource(theirs)
    assert set(one.names()) == set(other.names())
    for name in one.names():
        assert one.read(name).tobytes() == other.read(name).tobytes()
        assert one.dtype(name) == other.dtype(name)
    written = [
        jaxtune.convert(source, tmp_path / source.name, dtype="float32", progress=False)
        for source in (safe, theirs)
    ]
    contents = [(path / "model.safetensors").read_bytes() for path in written]
    assert contents[0] == contents[1]
    if model_type == "deepseek":  # transformers lacks the architecture
        return
    expected = AutoModelForCausalLM.from_pretrained(theirs, dtype="float32").state_dict()
    for name, value in load_file(written[1] / "model.safetensors").items():
        assert torch.equal(value, expected[name]), name


def test_logits_and_the_other_openings_are_those_of_safetensors(both, tmp_path):
    tokens = np.arange(24).reshape(2, 12) % 160
    found = []
    for directory in both("llama", "bfloat16"):
        model = jaxtune.load(directory, progress=False)
        found.append(np.asarray(model.logits(tokens)).tobytes())
    assert found[0] == found[1]
    config = config_module.resolve({"model": {"path": str(both("llama", "bfloat16")[1])}})
    assert model_config(config.model)["model_type"] == "llama"


def test_a_tied_model_whose_head_is_in_the_file(tiny, tmp_path):
    """As transformers wrote it: two names for one storage."""
    source = tiny("llama", tie_word_embeddings=True)
    directory = shutil.copytree(source, tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save(OrderedDict(tensors), directory / "pytorch_model.bin")
    expected = jaxtune.convert(source, tmp_path / "a", progress=False) / "model.safetensors"
    ours = jaxtune.convert(directory, tmp_path / "b", progress=False) / "model.safetensors"
    assert ours.read_bytes() == expected.read_bytes()


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory):
    """The same adapter as PEFT writes it in either form."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "down_proj"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    peft = get_peft_model(model, config)
    directory = tmp_path_factory.mktemp("adapters")
    peft.save_pretrained(directory / "safe")
    peft.save_pretrained(directory / "torch", safe_serialization=False)
    assert not list((directory / "torch").glob("*.safetensors"))
    return directory / "safe", directory / "torch"


def test_an_adapter_is_that_of_safetensors(adapters):
    one, other = (read_adapter(directory) for directory in adapters)
    assert one.config == other.config
    assert set(one.tensors) == set(other.tensors)
    for name, value in one.tensors.items():
        assert value.dtype == other.tensors[name].dtype
        assert value.tobytes() == other.tensors[name].tobytes()


def test_an_adapter_opens_merges_and_combines(tiny, adapters, tmp_path):
    merged = []
    for directory in adapters:
        model = jaxtune.load(
            tiny("llama"), dtype="float32", adapters={"a": directory}, progress=False
        )
        out = model.use({"a": 1.0}).save_pretrained(tmp_path / directory.name)
        merged.append((out / "model.safetensors").read_bytes())
    assert merged[0] == merged[1]


@pytest.mark.slow
def test_an_adapter_with_100000_tensors_opens_in_ten_seconds(tmp_path):
    """As many as there are with factors on all experts of DeepSeek-V3."""
    value = torch.zeros(2)
    prefix = "base_model.model.model.layers"
    names = [
        f"{prefix}.{layer}.mlp.experts.{expert}.down_proj.lora_{factor}.weight"
        for layer in range(50)
        for expert in range(1000)
        for factor in "AB"
    ]
    storages = [value.clone() for _ in names]
    torch.save(dict(zip(names, storages, strict=True)), tmp_path / "f.bin")
    start = time.process_time()  # other tests run at the same time
    file = TorchFile(tmp_path / "f.bin")
    assert all(file.read(name).shape == (2,) for name in file.names())
    assert time.process_time() - start < 10
    assert len(file.names()) == 100_000


def refusal(path):
    with pytest.raises(JaxtuneError) as raised:
        TorchFile(path)
    message = str(raised.value)
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def script(path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)


def old(path):
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)


def compressed(path):
    torch.save({"a": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def big_endian(path):
    torch.save({"a": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, b"big" if name.endswith("byteorder") else content)


def damaged(path):
    torch.save({"a": torch.ones(2)}, path)
    content = path.read_bytes()
    at = content.index(b"FloatStorage")
    path.write_bytes(content[: at - 8] + b"\0" + content[at - 7 :])


def saved(make):
    return lambda path: torch.save(make(), path)


def written(content):
    return lambda path: path.write_bytes(content)


OTHERS = {
    "nested": (
        saved(lambda: {"model": {"a": torch.ones(2)}, "epoch": 3}),
        '"model" is a nested dict, not a tensor: save that dict alone, torch.save('
        "torch.load('f.bin', weights_only=True)['model'], 'f.bin')",
    ),
    "a number": (
        saved(lambda: {"a": torch.ones(2), "epoch": 3}),
        '"epoch" is not a tensor but of type int',
    ),
    "one tensor": (saved(lambda: torch.ones(2)), "is not a state dict"),
    "a list": (
        saved(lambda: [torch.ones(2)]),
        "its pickle uses EMPTY_LIST, which no state dict needs",
    ),
    "a module": (
        saved(lambda: torch.nn.Linear(2, 2)),
        "its pickle names torch.nn.modules.linear.Linear, which no state dict of plain tensors",
    ),
    "sparse": (
        saved(lambda: {"a": torch.eye(2).to_sparse()}),
        "its pickle names torch._utils._rebuild_sparse_tensor",
    ),
    "quantized": (
        saved(lambda: {"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}),
        "its pickle names torch._utils._rebuild_qtensor",
    ),
    "complex": (
        saved(lambda: {"a": torch.ones(2) * 1j}),
        "its pickle names torch.ComplexFloatStorage",
    ),
    "negated": (
        saved(lambda: {"a": torch.tensor([1j]).conj().imag}),
        "its pickle gives a tensor hooks or flags",
    ),
    "integer keys": (
        saved(lambda: {1: torch.ones(2)}),
        "its pickle has a key that is a int, not a string",
    ),
    "TorchScript": (script, "is a TorchScript program: save its state dict"),
    "plain pickle": (old, "is a plain pickle, as PyTorch wrote before 1.6: write it again with"),
    "tar": (written(b"x" * 257 + b"ustar" + bytes(400)), "is in the tar format of PyTorch before"),
    "Git LFS": (
        written(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"),
        "is a Git LFS pointer, not the file: run git lfs pull",
    ),
    "compressed": (compressed, "contains compressed or encrypted files"),
    "big endian": (big_endian, "was written on a big-endian machine"),
    "damaged": (damaged, "is damaged: the checksum of its data.pkl is wrong"),
    "empty": (written(b""), "is empty"),
    "text": (written(b"hello"), "is not a zip file of torch.save"),
}


@pytest.mark.parametrize("layout", OTHERS)
@pytest.mark.filterwarnings("ignore")
def test_another_layout_is_rejected_with_advice(tmp_path, layout):
    make, message = OTHERS[layout]
    make(tmp_path / "f.bin")
    assert refusal(tmp_path / "f.bin").startswith(message)


@pytest.mark.parametrize("cut", [1, 22, 100, 600])
def test_a_truncated_file(tmp_path, cut):
    torch.save(state_dict(), tmp_path / "f.bin")
    content = (tmp_path / "f.bin").read_bytes()
    (tmp_path / "f.bin").write_bytes(content[:-cut])
    assert refusal(tmp_path / "f.bin").startswith("is not a valid zip file")


def test_a_pointer_in_place_of_safetensors_is_named_too(tiny, tmp_path):
    directory = shutil.copytree(tiny("llama"), tmp_path / "model")
    path = directory / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    with pytest.raises(JaxtuneError) as raised:
        HuggingFaceSource(directory)
    assert str(raised.value) == f"{path}: is a Git LFS pointer, not the file: run git lfs pull"


def test_an_index_names_only_files_of_its_own_form(both, tmp_path):
    directory = shutil.copytree(both("llama", "bfloat16")[1], tmp_path / "model")
    index = json.loads((directory / INDEX).read_text())
    for name in ("../pytorch_model.bin", "model.safetensors"):
        index["weight_map"]["evil"] = name
        (directory / INDEX).write_text(json.dumps(index))
        with pytest.raises(JaxtuneError, match=r"the file name .* is not allowed"):
            HuggingFaceSource(directory)
