"""Secrets of the environment are not in anything that jaxtune writes or prints."""

import json

import pytest

# A marker in each, and variables whose names say that they are secrets.
MARK = "s3cr3t-of-the-environment"
NAMES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "OPENAI_API_KEY",
    "MY_PASSWORD",
    "https_proxy",
)
SECRETS = {
    name: f"http://user:{MARK}-{name}@localhost:9" if "proxy" in name else f"{MARK}-{name}"
    for name in NAMES
}


@pytest.mark.slow
def test_secrets_are_in_no_file_and_in_no_output(server, small_config, tmp_path):
    workdir, merged = tmp_path / "run", tmp_path / "merged"
    environ = SECRETS | {"NO_PROXY": "localhost,127.0.0.1"}
    steps = ("--config.training.steps=4", "--config.checkpoint.every=2")
    train = ("train", "--config", small_config, *steps, "--workdir", workdir)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": 3}\n')
    outputs = [
        server.run(*arguments, code=code, fault=fault, environ=environ | more)
        for arguments, code, fault, more in (
            (train, 0, None, {}),
            (("eval", "--workdir", workdir, "--json"), 0, None, {}),
            (("generate", "--workdir", workdir, "--prompt", "a1"), 0, None, {}),
            (("export", "--workdir", workdir, "--format", "peft", "--to", merged), 0, None, {}),
            (("plan", "--config", small_config), 0, None, {}),
            # A mistake, also with the traceback of JAXTUNE_DEBUG, a model that is not found, and a
            # run that fails and one that is ended with the stacks of its threads.
            ((*train, f"--config.data.train={bad}"), 65, None, {}),
            ((*train, "--config.training.stepz=4"), 1, None, {"JAXTUNE_DEBUG": "1"}),
            ((*train[:3], "--config.model.path=nobody/nothing", *train[-2:]), 65, None, {}),
            ((*train[:-1], tmp_path / "failed"), 1, "failing_save", {}),
            (
                (*train[:-1], tmp_path / "stalled", "--config.checkpoint.timeout_minutes=0.1"),
                75,
                "stalled_save",
                {},
            ),
        )
    ]
    assert json.loads(outputs[1].splitlines()[-1])
    assert "Traceback" in outputs[6] and "Traceback" in outputs[8]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.json", "metrics.jsonl", "adapter_config.json", "manifest.json"} <= {
        path.name for path in files
    }
    for name, secret in SECRETS.items():
        assert not [number for number, text in enumerate(outputs) if secret in text], name
        assert not [path for path in files if secret.encode() in path.read_bytes()], name
    assert not any(MARK in str(path) for path in files)


def test_the_address_of_a_mirror_is_shown_without_its_password(monkeypatch):
    from huggingface_hub import constants

    from jaxtune.hub import unreachable

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"https://user:{MARK}@mirror:8443/hub")
    assert unreachable().startswith("https://mirror:8443/hub does not answer")
