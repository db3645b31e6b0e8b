"""The command line: one-line errors without a traceback."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from jaxtune.cli import main


@pytest.fixture
def data(tmp_path):
    """Writes a data set of messages, or of raw lines."""

    def write(*lines, name="train.jsonl"):
        path = tmp_path / name
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write


def chat(question, answer):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns})


@pytest.fixture
def config(tmp_path, tiny_chat, data):
    """A config file of a small run that works."""
    train = data(chat("one", "two"), chat("three", "four"))
    path = tmp_path / "small.py"
    path.write_text(
        "from jaxtune import config\n\n"
        "def get_config():\n"
        "    c = config.default()\n"
        f"    c.model.path = {str(tiny_chat)!r}\n"
        f"    c.data.train = {str(train)!r}\n"
        "    c.data.max_length = 64\n"
        "    c.training.steps = 2\n"
        "    c.training.batch_size = 2\n"
        "    return c\n"
    )
    return path


@pytest.fixture
def fails(capsys, tmp_path):
    """Runs a command that has to fail, in this process; returns the line that it says."""

    def run(*arguments, code=65):
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        assert exit_.value.code == code
        lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line.lower()]
        assert len(lines) == 1 and lines[0].startswith("jaxtune: error: "), lines
        assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()
        return lines[0].removeprefix("jaxtune: error: ")

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["trian"],
            'unknown command "trian"; did you mean "train"? (known: train, config, data, eval, '
            "generate, export, combine, convert, plan, experts, quickstart)",
        ),
        (
            ["train", "train.yaml"],
            'jaxtune train: unexpected argument "train.yaml"; a config is a Python file (.py) and '
            "follows --config",
        ),
        (
            ["train", "--workdir", "run", "adapter.rank=8"],
            'jaxtune train: unexpected argument "adapter.rank=8"; did you mean '
            '"--config.adapter.rank=8"?',
        ),
        (
            ["eval", "."],
            'jaxtune eval: unexpected argument "."; did you mean "--workdir ."?',
        ),
        (
            ["data", "stats", "--config", "x.py", "rows"],
            'jaxtune data: unexpected argument "rows"; did you mean "--rows"?',
        ),
        (
            ["config", "adaptr"],
            'unknown config section or key "adaptr"; did you mean "adapter"? (sections: model, '
            "data, adapter, quantize, training, optimizer, checkpoint, evaluation, logging, "
            "profile, mesh)",
        ),
        (["config", "a", "b"], 'jaxtune config: unexpected argument "b"'),
        (
            ["train", "--workdri", "run"],
            'jaxtune train: unknown argument "--workdri"; did you mean "--workdir"?',
        ),
        (["train"], "jaxtune train: the following arguments are required: --workdir"),
        (["train", "--workdir", "run"], "run: not a run directory (no config.json)"),
        (
            ["export", "--workdir", "run", "--format", "mergd", "--to", "out"],
            'jaxtune export: argument --format: invalid choice "mergd"; did you mean "merged"? '
            "(choose from: peft, vllm, merged)",
        ),
        (
            ["eval", "--workdir", "run", "--config.training.steps=3"],
            "jaxtune eval: unexpected --config.training.steps=3: this command does not take a "
            "config",
        ),
        (
            ["generate", "--prompt", "hello"],
            "jaxtune generate: one of the arguments --workdir --model is required",
        ),
        (
            ["generate", "--workdir", "run", "--prompt", "x"],
            "run: not a run directory (no config.json)",
        ),
        (
            ["convert", "--from", "nowhere.gguf", "--to", "out"],
            "nowhere.gguf: no such file or directory",
        ),
    ],
)
def test_wrong_arguments(fails, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert fails(*arguments) == message


def test_an_unknown_key_is_named_with_the_closest(fails, config, tmp_path):
    line = fails(
        "train", "--config", config, "--workdir", tmp_path / "run", "--config.data.trian=x"
    )
    assert line == 'unknown config key "data.trian"; did you mean "data.train"?'


def test_an_unknown_target_is_named_with_what_exists(fails, config, tmp_path):
    flags = ["--config", config, "--workdir", tmp_path / "run", "--config.adapter.targets", "qproj"]
    line = fails("train", *flags)
    assert line.startswith(
        'adapter.targets: "qproj" matches no module; did you mean "q_proj"? (there are: down_proj'
    )


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "train.jsonl: no such file"),
        ([chat("a", "b"), '{"messages": ['], "train.jsonl:2: invalid JSON: Expecting value"),
        ([chat("a", "b"), chat("a", "")], "train.jsonl:2: "),
        ([chat("a", "b" * 100)], "train.jsonl:1: 122 tokens exceed data.max_length=64"),
        (['{"input_ids": [1, 258], "labels": [1, 258]}'], "train.jsonl:1: input_ids contains 258"),
    ],
    ids=["missing", "broken", "empty answer", "over-long", "vocabulary"],
)
def test_bad_data_is_named_by_line(fails, config, data, tmp_path, lines, message):
    data(*lines or ())
    if lines is None:
        (tmp_path / "train.jsonl").unlink()
    line = fails("train", "--config", config, "--workdir", tmp_path / "run")
    assert line.startswith(f"{tmp_path}/{message}")


@pytest.mark.parametrize("key", ["train", "eval"])
def test_a_misspelled_file_is_reported_before_the_model_is_set_up(fails, config, tmp_path, key):
    # The target, which does not exist either, is looked up in the model.
    flags = ["--config", config, "--workdir", tmp_path / "run", "--config.adapter.targets=nothing"]
    line = fails("train", *flags, f"--config.data.{key}={tmp_path}/trian.jsonl")
    assert line == (f'{tmp_path}/trian.jsonl: no such file; did you mean "{tmp_path}/train.jsonl"?')


def _damaged(tiny_chat, tmp_path, change):
    model = tmp_path / "model"
    shutil.copytree(tiny_chat, model)
    change(model / "model.safetensors")
    return model


def _wrong_shape(path):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path)
    name = "model.layers.1.mlp.down_proj.weight"
    save_file(tensors | {name: tensors[name][:, :-1].copy()}, path)


def test_a_wrong_shape_is_named(fails, config, tmp_path, tiny_chat):
    model = _damaged(tiny_chat, tmp_path, _wrong_shape)
    flags = ["--config", config, "--workdir", tmp_path / "run", f"--config.model.path={model}"]
    line = fails("train", *flags)
    assert "model.layers.1.mlp.down_proj.weight is [64, 95], not [64, 96]" in line


def test_truncated_safetensors_are_named(fails, config, tmp_path, tiny_chat):
    model = _damaged(tiny_chat, tmp_path, lambda path: os.truncate(path, path.stat().st_size // 2))
    flags = ["--config", config, "--workdir", tmp_path / "run", f"--config.model.path={model}"]
    assert fails("train", *flags).startswith(f"{model / 'model.safetensors'}: ")
    assert fails("convert", "--from", model, "--to", tmp_path / "out").startswith(f"{model}/")


def test_a_corrected_config_replaces_one_that_failed(fails, config, tmp_path):
    from jaxtune.config import load_file, resolve
    from jaxtune.runs.directory import RunDirectory

    workdir = tmp_path / "run"
    fails("train", "--config", config, "--workdir", workdir, "--config.data.train=nowhere.jsonl")
    with RunDirectory(workdir).start(resolve(load_file(config))) as frozen:
        assert frozen.data.train.endswith("train.jsonl")


def test_a_taken_name_is_refused_before_anything_is_loaded(capsys, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(SystemExit):
        main(["convert", "--from", "nowhere", "--to", str(tmp_path)])
    assert "already exists; remove it or choose another path" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_a_file_that_cannot_be_made_is_named(capsys, config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--config", str(config), "--workdir", str(tmp_path / "file" / "run")])
    assert exit_.value.code == 65
    assert capsys.readouterr().err == f"jaxtune: error: {tmp_path}/file/run: Not a directory\n"


# Packages that take a second or more to import.
SLOW_IMPORTS = {"jax", "flax", "optax", "orbax", "torch", "transformers", "datasets", "pyarrow"}


@pytest.mark.parametrize(
    "action",
    [
        *(
            f"main({arguments})"
            for arguments in (["--help"], ["--version"], ["train", "--help"], ["config"])
        ),
        "resolve(load_file(sys.argv[1]), ['adapter.method=dora', 'data.format=messages'])",
    ],
)
def test_help_and_configs_do_not_wait_for_imports(action, config):
    script = (
        "import contextlib, sys\n"
        "from jaxtune.cli import main\n"
        "from jaxtune.config import load_file, resolve\n"
        f"with contextlib.suppress(SystemExit): {action}\n"
        "print('imported', *sorted(sys.modules))"
    )
    command = [sys.executable, "-c", script, str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    shown, _, imported = done.stdout.rpartition("imported ")
    assert not done.stderr and (shown or "resolve" in action)
    assert "jaxtune.registry" in imported.split()
    assert not SLOW_IMPORTS & set(imported.split())


def test_config_lists_every_option(capsys):
    from jaxtune.config import OPTIONS
    from jaxtune.registry import METHODS

    main(["config"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("=")[0] for line in lines] == list(OPTIONS)
    for line, option in zip(lines, OPTIONS.values(), strict=True):
        assert option.help in line and all(choice in line for choice in option.choices)
    (rank,) = [line for line in lines if line.startswith("adapter.rank=16  ")]
    assert "whole number, at least 1" in rank
    assert "read with adapter.method: lora, dora, pissa, vera" in rank
    main(["config", "--json", "--config.adapter.method"[2:]])
    (method,) = json.loads(capsys.readouterr().out).values()
    assert method["choices"] == list(METHODS) and method["default"] == "lora"


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("mesh", ["mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.expert", "mesh.sequence"]),
        ("adapter.rank", ["adapter.rank"]),
        ("rank", ["adapter.rank"]),
        ("batch_size", ["training.batch_size", "evaluation.batch_size"]),
    ],
)
def test_config_lists_a_section_or_an_option(capsys, name, keys):
    main(["config", name])
    assert [line.partition("=")[0] for line in capsys.readouterr().out.splitlines()] == keys


def test_config_on_a_terminal_has_sections_and_wraps(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    main(["config", "mesh"])
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert shown.splitlines()[0].startswith("mesh  ")
    assert "  data=-1" in shown and "--config.SECTION.NAME=VALUE" in shown.replace("\n", " ")
    assert max(map(len, shown.splitlines())) <= 60


def test_a_full_disk_is_one_line(config, tmp_path):
    # A limit on the size of files is a full disk that needs no privileges to set up.
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
        "from jaxtune.cli import main; main(sys.argv[1:])"
    )
    export = tmp_path / "out"
    command = [sys.executable, "-c", script, "convert", "--to", export, "--from"]
    source = config.read_text().split("c.model.path = ")[1].splitlines()[0].strip("'")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": ""}
    done = subprocess.run([*command, source], env=environment, capture_output=True, text=True)
    assert done.returncode == 65
    assert done.stderr.startswith(f"jaxtune: error: {export}: ")
    assert len(done.stderr.splitlines()) == 1
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_traceback_can_be_requested(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXTUNE_DEBUG", "1")
    from jaxtune import JaxtuneError

    with pytest.raises(JaxtuneError):
        main(["train", "--workdir", str(tmp_path / "run")])


def test_sampling_is_public():
    import jaxtune
    from jaxtune.generation.sampling import Sampling

    assert jaxtune.Sampling is Sampling and "Sampling" in jaxtune.__all__


def test_output_that_nothing_reads_is_no_error():
    command = [sys.executable, "-m", "jaxtune.cli", "config"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
