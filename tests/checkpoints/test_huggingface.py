"""Hugging Face checkpoints, read and written. As a program, this file is a save that is killed."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from disks import small_disk
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import jaxtune
from jaxtune.adapters.define import define
from jaxtune.checkpoints import huggingface
from jaxtune.errors import JaxtuneError
from jaxtune.parallel.mesh import single_device_mesh

INDEX = "model.safetensors.index.json"


def tensors_of(directory):
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


def rewrite(source, target, dtype=torch.float32, shard_size="5GB"):
    """Has transformers write a checkpoint again, in another dtype and in shards."""
    AutoModelForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(
        target, max_shard_size=shard_size
    )
    return target


@pytest.fixture
def copy(tiny, tmp_path):
    """A checkpoint to damage, and a function that changes its config.json."""
    directory = tmp_path / "model"
    shutil.copytree(tiny("llama"), directory)

    def configure(drop=(), **changes):
        path = directory / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))
        return directory

    return configure


def refusal(directory, **options):
    """Loads what cannot be loaded; returns the message, which is one line."""
    with pytest.raises(JaxtuneError) as raised:
        jaxtune.load(directory, progress=False, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


class TestRoundTrip:
    @pytest.mark.parametrize(
        ("model_type", "changes"),
        [
            ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
            ("qwen2", {"num_key_value_heads": 1}),
            ("qwen3", {"tie_word_embeddings": False}),
        ],
    )
    @pytest.mark.parametrize("shard_size", ["5GB", "50KB"])
    def test_bfloat16_comes_back_bit_for_bit(self, tiny, tmp_path, model_type, changes, shard_size):
        theirs = rewrite(tiny(model_type, **changes), tmp_path / "a", torch.bfloat16, shard_size)
        assert (theirs / INDEX).is_file() == (shard_size == "50KB")
        ours = jaxtune.load(theirs, progress=False).save_pretrained(tmp_path / "b")
        before, after = tensors_of(theirs), tensors_of(ours)
        assert set(before) == set(after)
        for name, value in before.items():
            assert after[name].dtype == torch.bfloat16
            assert torch.equal(value.view(torch.int16), after[name].view(torch.int16)), name

    def test_small_shards_get_an_index_that_transformers_reads(self, tiny, tmp_path):
        source = huggingface.HuggingFaceSource(tiny("llama"))
        definition = define(source.config, "float32")
        tree, _ = huggingface.load(definition, source, single_device_mesh(), progress=False)
        huggingface.save(tmp_path / "out", definition, tree, shard_bytes=50_000)
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        assert len(set(index["weight_map"].values())) > 3
        before = AutoModelForCausalLM.from_pretrained(tiny("llama")).state_dict()
        after, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", output_loading_info=True
        )
        assert not any(info.values()), info
        assert all(torch.equal(value, before[name]) for name, value in after.state_dict().items())

    @pytest.mark.parametrize(
        ("held", "written", "expected"),
        [
            ("bfloat16", None, "bfloat16"),
            ("float32", None, "float32"),
            ("float32", "bfloat16", "bfloat16"),
            ("bfloat16", "float32", "float32"),
        ],
    )
    def test_the_config_keeps_every_key_and_has_the_dtype(self, copy, held, written, expected):
        directory = copy(torch_dtype="float16", dtype="float16", my_key={"kept": [1, None]})
        model = jaxtune.load(directory, dtype=held, progress=False)
        ours = model.save_pretrained(directory.parent / "out", dtype=written)
        before = json.loads((directory / "config.json").read_text())
        after = json.loads((ours / "config.json").read_text())
        assert after == before | {"torch_dtype": expected, "dtype": expected}
        assert {str(v.dtype) for v in tensors_of(ours).values()} == {f"torch.{expected}"}

    @pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.float64])
    def test_rounding_to_bfloat16_is_that_of_torch(self, tiny, tmp_path, kind):
        values = tensors_of(tiny("llama"))
        directory = tmp_path / "in"
        shutil.copytree(tiny("llama"), directory)
        values = {k: v.to(kind) for k, v in values.items()}
        save_file(values, directory / "model.safetensors", metadata={"format": "pt"})
        ours = jaxtune.load(directory, progress=False).save_pretrained(tmp_path / "out")
        for name, value in tensors_of(ours).items():
            # Both go through float32, jax by default and torch here.
            assert torch.equal(value, values[name].float().bfloat16()), name

    def test_writing_in_another_dtype_rounds_as_torch_does(self, tiny, tmp_path):
        model = jaxtune.load(tiny("llama"), dtype="float32", progress=False)
        ours = tensors_of(model.save_pretrained(tmp_path / "out", dtype="bfloat16"))
        for name, value in tensors_of(tiny("llama")).items():
            assert torch.equal(ours[name], value.bfloat16()), name

    @pytest.mark.parametrize("wide", [0, 1])
    def test_layers_with_different_dtypes_keep_every_bit(self, tiny, tmp_path, wide):
        """As some tools leave a few layers in more bits than the others."""
        directory = shutil.copytree(tiny("llama", intermediate_size=512), tmp_path / "model")
        tensors = load_file(directory / "model.safetensors")
        narrow = [name for name in tensors if f"model.layers.{wide}." not in name]
        tensors |= {name: tensors[name].to(torch.bfloat16) for name in narrow}
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        held = jaxtune.load(directory, dtype="float32").save_pretrained(tmp_path / "held")
        for name, value in load_file(held / "model.safetensors").items():
            assert torch.equal(value, tensors[name].float()), name

    def test_the_tokenizer_and_the_generation_config_are_exported(self, copy):
        directory = copy()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        PreTrainedTokenizerFast(
            tokenizer_object=backend, clean_up_tokenization_spaces=False, chat_template="{{ 1 }}"
        ).save_pretrained(directory)
        generation = {"eos_token_id": [2, 3], "temperature": 0.6, "do_sample": True}
        (directory / "generation_config.json").write_text(json.dumps(generation))
        ours = jaxtune.load(directory, progress=False).save_pretrained(directory.parent / "out")
        assert json.loads((ours / "generation_config.json").read_text()) == generation
        before, after = (AutoTokenizer.from_pretrained(path) for path in (directory, ours))
        assert after.chat_template == "{{ 1 }}"
        assert after("Grüße 你好")["input_ids"] == before("Grüße 你好")["input_ids"]

    def test_nothing_but_weights_and_config_without_a_tokenizer(self, tiny, tmp_path):
        (tmp_path / "in").mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(tiny("llama") / name, tmp_path / "in")
        ours = jaxtune.load(tmp_path / "in", progress=False).save_pretrained(tmp_path / "out")
        written = {"config.json", "generation_config.json", "model.safetensors"}
        assert {path.name for path in ours.iterdir()} == written

    def test_tensors_that_are_not_needed_are_named_with_a_reason(self, tiny, tmp_path):
        directory = tmp_path / "in"
        shutil.copytree(tiny("llama", tie_word_embeddings=True), directory)
        values = tensors_of(directory)
        values["lm_head.weight"] = values["model.embed_tokens.weight"].clone()
        values["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        save_file(values, directory / "model.safetensors")
        source = huggingface.HuggingFaceSource(directory)
        definition = define(source.config, "float32")
        _, ignored = huggingface.load(definition, source, single_device_mesh(), progress=False)
        assert ignored == {
            "lm_head.weight": "tied to the embedding",
            "model.layers.0.self_attn.rotary_emb.inv_freq": "computed from config.json",
        }


class TestTensors:
    @staticmethod
    def edit(directory, change):
        values = tensors_of(directory)
        change(values)
        save_file(values, directory / "model.safetensors")
        return directory

    def test_a_missing_tensor_is_named_with_the_closest_extra_one(self, copy):
        def rename(values):
            values["model.layers.1.mlp.upproj.weight"] = values.pop(
                "model.layers.1.mlp.up_proj.weight"
            )

        directory = self.edit(copy(), rename)
        assert refusal(directory) == (
            f"{directory}: does not fit its config: 1 tensor(s) missing: "
            "model.layers.1.mlp.up_proj.weight; did you mean "
            '"model.layers.1.mlp.upproj.weight"?; 1 tensor(s) not in the architecture: '
            "model.layers.1.mlp.upproj.weight"
        )

    def test_many_missing_tensors_are_counted(self, copy):
        def drop(values):
            for name in [name for name in values if ".mlp." in name]:
                del values[name]

        message = refusal(self.edit(copy(), drop))
        assert "9 tensor(s) missing: model.layers.0.mlp.down_proj.weight, " in message
        assert message.endswith(" and 4 more")

    def test_a_wrong_shape_names_both_shapes_and_the_file(self, copy):
        def transpose(values):
            values["model.layers.2.mlp.up_proj.weight"] = torch.zeros(64, 96)

        directory = self.edit(copy(), transpose)
        assert refusal(directory).endswith(
            "1 tensor(s) of the wrong shape: model.layers.2.mlp.up_proj.weight is [64, 96], not "
            f"[96, 64] ({directory / 'model.safetensors'})"
        )

    def test_integer_tensors_are_not_weights(self, copy):
        def quantize(values):
            values["model.norm.weight"] = torch.ones(64, dtype=torch.int8)

        assert "dtype that weights do not have: model.norm.weight is int8" in refusal(
            self.edit(copy(), quantize)
        )

    def test_an_untrusted_name_does_not_break_the_line(self, copy):
        def add(values):
            values["evil\n\x1b[31m"] = torch.ones(1)
            values["long" * 1000] = torch.ones(1)

        message = refusal(self.edit(copy(), add))
        assert r"'evil\n\x1b[31m'" in message
        assert len(message) < 500


class TestFiles:
    @pytest.fixture
    def sharded(self, tiny, tmp_path):
        """A sharded checkpoint, and a function that changes its index."""
        directory = rewrite(tiny("llama"), tmp_path / "model", shard_size="100KB")
        path = directory / INDEX

        def change(**weight_map):
            index = json.loads(path.read_text())
            index["weight_map"] |= weight_map
            path.write_text(json.dumps(index))
            return directory

        return change

    def test_a_missing_shard(self, sharded):
        directory = sharded()
        gone = sorted(directory.glob("model-*.safetensors"))[1]
        gone.unlink()
        assert refusal(directory) == f"{gone}: no such file"

    def test_a_truncated_shard(self, sharded):
        directory = sharded()
        cut = sorted(directory.glob("model-*.safetensors"))[1]
        os.truncate(cut, cut.stat().st_size - 1)
        assert refusal(directory).startswith(f"{cut}: not a valid safetensors file")

    def test_a_tensor_in_two_shards(self, sharded):
        directory = sharded(again="more.safetensors")
        save_file({"model.norm.weight": torch.ones(64)}, directory / "more.safetensors")
        assert 'tensor "model.norm.weight" is also in another file' in refusal(directory)

    @pytest.mark.parametrize(
        "name",
        ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "", ".", "..", "x.bin", 3, None, []],
    )
    def test_an_index_may_only_name_files_beside_it(self, sharded, name, tmp_path):
        save_file({"evil": torch.ones(1)}, tmp_path / "x.safetensors")
        directory = sharded(evil=name)
        assert refusal(directory).startswith(f"{directory / INDEX}: the file name ")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", ":1: invalid JSON: "),
            ("[]", ": not a JSON object"),
            ("{}", ': has no "weight_map"'),
            ('{"weight_map": []}', ': has no "weight_map"'),
            ('{"weight_map": {}}', ': has no "weight_map"'),
        ],
    )
    def test_a_broken_index(self, sharded, content, message):
        directory = sharded()
        (directory / INDEX).write_text(content)
        assert refusal(directory).startswith(f"{directory / INDEX}{message}")

    def test_no_weights_at_all(self, copy):
        directory = copy()
        (directory / "model.safetensors").unlink()
        assert "holds neither model.safetensors nor" in refusal(directory)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, ": no such file"),
            (b"", ":1: invalid JSON: "),
            (b"\xff\xfe", ": not UTF-8 (byte 1 of the file: "),
            (b"[" * 100_000, ": JSON is nested too deeply"),
            (b'"llama"', ": not a JSON object"),
            (b'{"a": 1, "a": 2}', ': invalid JSON: duplicate key "a"'),
            (b'{"a": NaN}', ": invalid JSON: NaN is not allowed"),
            (b'{"a": ' + b"9" * 5000 + b"}", ": invalid JSON: an integer of more than 4300 digits"),
            (b'{"a": "\\ud800"}', ": a string has an unpaired surrogate"),
        ],
    )
    def test_a_broken_config(self, copy, content, message):
        path = copy() / "config.json"
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        assert refusal(path.parent).startswith(f"{path}{message}")

    def test_a_config_that_is_a_directory(self, copy):
        path = copy() / "config.json"
        path.unlink()
        path.mkdir()
        assert refusal(path.parent) == f"{path}: not a regular file"

    def test_a_config_that_is_a_fifo(self, copy):
        path = copy() / "config.json"
        path.unlink()
        os.mkfifo(path)
        assert refusal(path.parent) == f"{path}: not a regular file"


class TestPlace:
    @pytest.mark.parametrize(
        "path", ["./nowhere", "/nowhere/at/all", "a/b/c", "model.gguf", "~/no"]
    )
    def test_a_missing_path(self, path):
        assert refusal(path) == f"{path}: no such file or directory"

    def test_a_misspelled_directory_is_corrected(self, tmp_path, monkeypatch):
        (tmp_path / "models" / "qwen").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        for path in ("./modle/qwen", "modle/qwem/part", f"{tmp_path}/models/qwn"):
            start = str(tmp_path) if path.startswith("/") else "models"
            assert f'no such file or directory; did you mean "{start}' in refusal(path)

    def test_an_empty_path(self):
        assert "model.path is empty" in refusal("")

    def test_a_file_that_is_not_a_model(self, tmp_path):
        (tmp_path / "weights.bin").touch()
        assert "neither a Hugging Face directory nor a .gguf file" in refusal(
            tmp_path / "weights.bin"
        )

    @pytest.mark.slow
    @pytest.mark.parametrize("offline", ["HF_HUB_OFFLINE", "HF_ENDPOINT"])
    def test_an_unreachable_hub_fails_quickly_with_one_line(self, tmp_path, offline):
        """In a process of its own: the hub's client reads its environment when it is imported."""
        value = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}[offline]
        reason = {
            "HF_HUB_OFFLINE": "HF_HUB_OFFLINE is set",
            "HF_ENDPOINT": "http://127.0.0.1:9 does not answer; HF_ENDPOINT selects a mirror",
        }[offline]
        program = "import sys, jaxtune; jaxtune.load(sys.argv[1])"
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", program, "deepseek-ai/deepseek-llm-7b-base"],
            env=os.environ | {"HF_HOME": str(tmp_path), offline: value},
            capture_output=True,
            text=True,
        )
        assert time.monotonic() - started < 60  # imports included, on a busy machine
        assert done.stderr.splitlines()[-1] == (
            "jaxtune.errors.JaxtuneError: deepseek-ai/deepseek-llm-7b-base: no such directory "
            f"here, not in the hub's cache, and the hub is out of reach ({reason})"
        )
        assert "Retrying" not in done.stderr


class TestSaving:
    def test_a_directory_that_is_not_empty_is_rejected(self, tiny, tmp_path):
        (tmp_path / "mine").touch()
        model = jaxtune.load(tiny("llama"), progress=False)
        with pytest.raises(JaxtuneError, match="already exists"):
            model.save_pretrained(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["mine"]

    def test_an_unknown_dtype_is_refused(self, tiny, tmp_path):
        model = jaxtune.load(tiny("llama"), progress=False)
        with pytest.raises(
            JaxtuneError, match='dtype="bfloat" is unknown; did you mean "bfloat16"'
        ):
            model.save_pretrained(tmp_path / "out", dtype="bfloat")
        assert list(tmp_path.iterdir()) == []

    def test_a_file_that_grows_too_large_is_one_line_and_leaves_nothing(self, tiny, tmp_path):
        model = jaxtune.load(tiny("llama"), dtype="float32", progress=False)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
        try:
            with pytest.raises(JaxtuneError) as raised:
                model.save_pretrained(tmp_path / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert str(raised.value).startswith(f"{tmp_path / 'out'}: cannot write: ")
        assert "File too large" in str(raised.value)
        assert "\n" not in str(raised.value)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.slow
    def test_a_full_disk_is_one_line_and_leaves_nothing(self, tiny, tmp_path):
        wrapper = small_disk(tmp_path, "300k")
        done = run_save(tiny("llama"), tmp_path / "out", "at once", wrapper=wrapper)
        output, errors = done.communicate(timeout=120)
        assert output, errors
        error, left = json.loads(output.splitlines()[-1])
        assert error.startswith(f"{tmp_path / 'out'}: cannot write: ")
        assert "No space left on device" in error
        assert "\n" not in error
        assert left == []

    @pytest.mark.slow
    def test_a_kill_in_the_middle_leaves_no_final_directory(self, tiny, tmp_path):
        with run_save(tiny("llama"), tmp_path / "out", "slowly") as process:
            assert process.stdout is not None
            while process.stdout.readline() != "half\n":
                assert process.poll() is None
            os.kill(process.pid, signal.SIGKILL)
        assert not (tmp_path / "out").exists()
        # The part that was written is there, so the kill did come in the middle.
        assert list(tmp_path.glob(".out-*/part-0.safetensors"))


def run_save(source, target, how, wrapper=()):
    command = [*wrapper, sys.executable, __file__, str(source), str(target), how]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)


def save(source, target, how):
    opened = huggingface.HuggingFaceSource(Path(source))
    definition = define(opened.config, "float32")
    tree, _ = huggingface.load(definition, opened, single_device_mesh(), progress=False)
    slow = {}
    if how == "slowly":

        def wait(frozen):
            print("half", flush=True)
            time.sleep(600)

        slow = {"model.norm.weight": wait}
    try:
        huggingface.save(target, definition, tree, shard_bytes=60_000, edits=slow)
    except JaxtuneError as error:
        print(json.dumps([str(error), [path.name for path in Path(target).parent.iterdir()]]))


if __name__ == "__main__":
    save(*sys.argv[1:])
