"""The kinds of malformed inputs, each with the command that reads it.

A kind is a function of a `random.Random`, the well-formed files and an empty directory. It writes a
damaged copy into the directory and returns a `Case`.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence

import mutations
from seeds import FAMILIES, ROWS

CONFIG = """from jaxtune import config

def get_config():
    c = config.default()
    c.model.path = {model!r}
    c.data.train = {data!r}
    c.data.max_length = 64
    c.data.cache = {cache!r}
    c.adapter.rank = 4
    c.training.steps = 1
    c.training.batch_size = 2
    c.training.dtype = "float32"
    c.checkpoint.every = 1
    c.logging.tensorboard = False
    return c
"""


ARGUMENTS = (
    *(*mutations.VALUES, "0x10", "1_0", "1e400", "5k", "0,", "a=b", "a=1e400", "=", "0-9999999999"),
    *("a{99999999999}", "(" * 400 + ")" * 400, "q_proj=nan", "/dev/zero", "/proc/self/mem"),
    *("1+" * 3000 + "1", "(" * 3000, "9" * 5000, "None", "5 epocs", "1e3 steps", "a@-1", "*" * 9),
)
LINES = (
    *("    return 1 / 0", "    c.adapter = 3", "    c.adapter.rank = object()", "\0", "  ("),
    *("    c.adapter.targets = lambda: 1", "    c.x.y = 1", "    return {1: {2: 3}}"),
    *("    c.data = [1]", "    import sys; sys.exit(0)", "    c.training.steps = 10**5000"),
    *("    return get_config()", "    c.model.path = b'x'"),
)
TEMPLATES = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    *("{{ ('a' * 3000000000) | length }}", "{{ 'a' * 10**10 }}", "{% include '/etc/passwd' %}"),
    *("{{ messages.__class__.__mro__ }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
    *("{{ cycler.__init__.__globals__.os.popen('touch ../marker') }}", "{% if %}", "{{" * 3000),
    "{{ raise_exception('no') }}",
)


@dataclasses.dataclass
class Case:
    """A malformed input.

    Attributes:
      about: description of the damage.
      command: arguments of `jaxtune`, or a function to call.
    """

    about: str
    command: Sequence[str] | Callable[[], object]


def _config(directory, model, data):
    path = directory / "config.py"
    cache = directory / "data-cache"
    path.write_text(CONFIG.format(model=str(model), data=str(data), cache=str(cache)))
    return path


def _text(value):
    return value if isinstance(value, str) else json.dumps(value)[:90_000]


def _argument(rng):
    """Returns a value for the command line, which cannot hold a NUL."""
    value = rng.choice(ARGUMENTS)
    value = mutations.noise(rng) if rng.random() < 0.1 else value
    encoded = _text(value).replace("\0", "\x01").encode("utf-8", "surrogatepass")
    return encoded.decode("utf-8", "surrogateescape")  # as Python decodes arguments


def options(rng, seeds, directory):
    """Options of a config on the command line, and flags of commands."""
    from jaxtune.config import OPTIONS

    config = _config(directory, seeds / "llama", seeds / "data" / "rows.csv")
    if rng.random() < 0.15:
        flags = ("max-new-tokens", "temperature", "top-p", "top-k", "seed", "stop", "chat-template")
        given = [f"--{rng.choice(flags)}={_argument(rng)}" for _ in range(rng.choice((1, 2)))]
        model = ["--model", str(seeds / "llama"), "--prompt", "x"]
        return Case(" ".join(given)[:200], ["generate", *model, "--max-new-tokens=1", *given])
    keys = rng.sample(sorted(OPTIONS), rng.choice((1, 1, 1, 2)))
    given = [f"--config.{key}={_argument(rng)}" for key in keys]
    starts = rng.random() < 0.6 and not any("steps" in key or "epochs" in key for key in keys)
    command = ["train", "--workdir", str(directory / "run")] if starts else ["data", "inspect"]
    return Case(" ".join(given)[:200], [*command, "--config", str(config), *given])


def config_files(rng, seeds, directory):
    """Python files of a config."""
    path = _config(directory, seeds / "llama", seeds / "data" / "rows.csv")
    lines = path.read_text().splitlines()
    if rng.random() < 0.4:
        about = mutations.damage_bytes(rng, path)
    else:
        at = rng.randrange(len(lines))
        line = rng.choice((*LINES, f"    {mutations.noise(rng)!r}"))
        lines[at : at + rng.choice((0, 1))] = [line]
        path.write_text("\n".join(lines))
        about = f"line {at + 1}: {line}"
    return Case(about, ["data", "inspect", "--config", str(path)])


def rows(rng, seeds, directory):
    """Files of rows: JSON, JSON lines, tables and text."""
    name = rng.choice(("jsonl", "jsonl", "jsonl", "json", "csv", "tsv", "parquet", "txt"))
    path = shutil.copy(seeds / "data" / f"rows.{name}", directory / f"rows.{name}")
    if name == "jsonl" and rng.random() < 0.6:
        damage = mutations.damage_json_lines
    elif name == "json":
        damage = mutations.damage_json
    else:
        damage = mutations.damage_bytes if rng.random() < 0.95 else mutations.damage_place
    about = damage(rng, path)
    config = _config(directory, seeds / "llama", path)
    return Case(about, ["data", "inspect", "--config", str(config)])


def _logits(model, adapter=None):
    def call():
        import jaxtune

        loaded = jaxtune.load(model, adapter=adapter, dtype="float32", progress=False)
        loaded.logits([[1, 2, 3]]).block_until_ready()

    return call


def adapters(rng, seeds, directory):
    """Directories of adapters."""
    target = shutil.copytree(seeds / "adapter", directory / "adapter")
    done = []
    for _ in range(rng.choice((1, 1, 2))):
        file = target / rng.choice(("adapter_config.json",) * 2 + ("adapter_model.safetensors",))
        if not file.is_file():
            continue
        damage = mutations.damage_json if file.suffix == ".json" else mutations.damage_safetensors
        damage = mutations.damage_place if rng.random() < 0.05 else damage
        try:
            done.append(damage(rng, file))
        except ValueError:  # damaged already
            done.append(mutations.damage_bytes(rng, file))
    return Case("; ".join(done), _logits(seeds / "llama", target))


def weights(rng, seeds, directory):
    """Files of weights: safetensors, indexes, PyTorch's and GGUF."""
    form = rng.choice(("llama", "llama", "sharded", "sharded", "torch", "gguf"))
    if form == "gguf":
        path = shutil.copy(seeds / "model.gguf", directory / "model.gguf")
        return Case(mutations.damage_gguf(rng, path), _logits(path))
    target = shutil.copytree(seeds / form, directory / form)
    if form == "torch":
        file = target / "pytorch_model.bin"
        return Case(mutations.damage_torch(rng, file, seeds.parent / "marker"), _logits(target))
    file = rng.choice(sorted(target.glob("*.safetensors")))
    if form == "sharded" and rng.random() < 0.5:
        file = target / "model.safetensors.index.json"
        return Case(mutations.damage_json(rng, file), _logits(target))
    damage = mutations.damage_place if rng.random() < 0.07 else mutations.damage_safetensors
    return Case(damage(rng, file), _logits(target))


def model_configs(rng, seeds, directory):
    """config.json of every family."""
    family = rng.choice(FAMILIES)
    target = shutil.copytree(seeds / family, directory / family)
    damage = mutations.damage_place if rng.random() < 0.03 else mutations.damage_json
    return Case(damage(rng, target / "config.json"), _logits(target))


def tokenizers(rng, seeds, directory):
    """Files of tokenizers, chat templates and generation settings."""
    target = shutil.copytree(seeds / "llama", directory / "llama")
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    file = target / rng.choice((*names, "chat_template.jinja"))
    if file.suffix == ".jinja" and rng.random() < 0.6:
        template = rng.choice((*TEMPLATES, mutations.noise(rng)))
        file.write_bytes(template.encode("utf-8", "surrogatepass"))
        about = f"template {template[:60]!r}"
    elif file.suffix == ".jinja":
        about = mutations.damage_bytes(rng, file)
    else:
        damage = mutations.damage_place if rng.random() < 0.05 else mutations.damage_json
        about = damage(rng, file)
    command = ["generate", "--model", str(target), "--prompt", "x", "--max-new-tokens", "1"]
    return Case(about, command)


def runs(rng, seeds, directory):
    """Directories of runs."""
    run = shutil.copytree(seeds / "run", directory / "run")
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and path.name != "lock"]
    main = [path for path in files if path.suffix in (".json", ".jsonl") or path.name[0] == "_"]
    file = rng.choice(main if rng.random() < 0.8 else files)
    if rng.random() < 0.07:
        damage = mutations.damage_place
    elif file.suffix == ".jsonl":
        damage = mutations.damage_json_lines
    elif file.suffix == ".json" or file.name.startswith("_"):
        damage = mutations.damage_json
    else:
        damage = mutations.damage_bytes
    try:
        about = damage(rng, file)
    except ValueError:
        about = mutations.damage_bytes(rng, file)
    about = f"{file.relative_to(run)}: {about}"
    step = run / "checkpoints" / "1"
    if file.is_file() and file.is_relative_to(step) and file.name != "manifest.json":
        # A hostile run has a manifest that fits its files.
        manifest = json.loads((step / "manifest.json").read_bytes())
        content = file.read_bytes()
        listed = [len(content), hashlib.sha256(content).hexdigest()]
        manifest[file.relative_to(step).as_posix()] = listed
        (step / "manifest.json").write_text(json.dumps(manifest))
    workdir = ["--workdir", str(run)]
    command = rng.choice(
        (
            ["train", *workdir, "--config.training.steps=2"],
            ["export", *workdir, "--format", "peft", "--to", str(directory / "out")],
            ["export", *workdir, "--format", "merged", "--to", str(directory / "out")],
            ["generate", *workdir, "--prompt", "x", "--max-new-tokens", "1"],
            ["eval", *workdir],
        )
    )
    return Case(about, command)


class _Odd:
    """An object of no use."""


def calls(rng, seeds, directory):
    """Arguments of the Python interface."""
    pool = (*mutations.VALUES, b"x", object(), _Odd, {1, 2}, (1,), 1j, range(3), print, 10**400)
    value, other = (copy_of(rng.choice(pool)) for _ in range(2))
    model, adapter = str(seeds / "llama"), str(seeds / "adapter")

    def loaded():
        import jaxtune

        return jaxtune.load(model, adapters={"x": adapter}, dtype="float32", progress=False)

    def configured(**arguments):
        import jaxtune

        config = {"model": {"path": model}, "data": {"max_length": 64}}
        config |= {"training": {"steps": 1, "batch_size": 2, "dtype": "float32"}}
        given = {"config": config, "train_data": ROWS[:4]} | arguments
        return jaxtune.train(**{"workdir": str(directory / "run"), "progress": False} | given)

    def reach(name, *arguments, **keywords):
        import jaxtune

        return getattr(jaxtune, name)(*arguments, **keywords)

    key = rng.choice(("temperature", "top_p", "top_k", "seed", "stop", "skip_special_tokens"))
    named = rng.choice(("adapter", "adapters", "quantize", "dtype", "revision", "attention"))
    section = rng.choice(("adapter", "data", "training", "optimizer", "mesh", "quantize"))
    choices = {
        f"generate({key})": lambda: loaded().generate("x", 1, **{key: value}),
        "generate(prompts)": lambda: loaded().generate(value, 1),
        "generate([prompt])": lambda: loaded().generate([value, other], 1),
        "generate(max_new_tokens)": lambda: loaded().generate("x", min_of(value)),
        "encode": lambda: loaded().encode(value),
        "use": lambda: loaded().use(value),
        "use(weights)": lambda: loaded().use({"x": value}),
        "use(options)": lambda: loaded().use({"x": 1.0}, "svd", rank=value, density=other),
        "logits": lambda: loaded().logits(value),
        "logits(positions)": lambda: loaded().logits([[1, 2]], positions=value),
        f"load({named})": lambda: reach("load", model, **{named: value}),
        "load": lambda: reach("load", value, progress=False),
        "Run": lambda: reach("Run", value),
        "convert": lambda: reach("convert", model, directory / "o", vocab_size=small_of(value)),
        "save": lambda: loaded().save_pretrained(directory / "o", value),
        "train(config)": lambda: configured(config=value),
        f"train({section})": lambda: configured(config={section: value}),
        "train(train_data)": lambda: configured(train_data=value),
        "train(rows)": lambda: configured(train_data=[value, {"prompt": other, "completion": "x"}]),
        "train(eval_data)": lambda: configured(eval_data=value),
        "train(callbacks)": lambda: configured(callbacks=value),
        "train(workdir)": lambda: configured(workdir=value if value != "x" else 5),
    }
    name = rng.choice(sorted(choices))
    return Case(f"{name}: {value!r:.60} {other!r:.40}", choices[name])


def min_of(value):
    """Returns a number of tokens that takes no time, or the value."""
    return value if not isinstance(value, int) or value < 100 or value >= 2**31 else 2**31


def small_of(value):
    """Returns a size of a vocabulary that takes no memory, or the value."""
    return value if not isinstance(value, int) or value < 1000 or value > 10**9 else 2**62


def copy_of(value):
    """Returns a value with what the placeholders of `mutations` stand for."""
    return (
        {"@digits@": "9" * 5000, "@surrogate@": "\ud800"}.get(value, value)
        if isinstance(value, str)
        else value
    )


KINDS = {
    "options": (options, 5),
    "config_files": (config_files, 2),
    "rows": (rows, 4),
    "adapters": (adapters, 4),
    "weights": (weights, 4),
    "model_configs": (model_configs, 5),
    "tokenizers": (tokenizers, 2),
    "runs": (runs, 4),
    "calls": (calls, 4),
}
"""Functions by name, and their share of the cases."""


def controls(seeds):
    """Yields the well-formed files, each with its command; the first ones make the run."""
    config = _config(seeds, seeds / "llama", seeds / "data" / "rows.csv")
    text = config.read_text()
    config.write_text(text.replace("    return c", "    c.data.eval_split = 2\n    return c"))
    run = ["--workdir", str(seeds / "run")]
    if not (seeds / "run").is_dir():
        yield Case("run", ["train", "--config", str(config), *run])
    yield Case("answer of a run", ["generate", *run, "--prompt", "x", "--max-new-tokens", "1"])
    yield Case("adapter", _logits(seeds / "llama", seeds / "adapter"))
    for model in (*FAMILIES, "sharded", "torch", "model.gguf"):
        yield Case(model, _logits(seeds / model))
    for file in sorted((seeds / "data").iterdir()):
        given = ["--config", str(config), f"--config.data.train={file}"]
        yield Case(file.name, ["data", "inspect", *given])
