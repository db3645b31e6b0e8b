"""Opening a model reads headers and config.json; the tokenizer is read on first use."""

import pytest

from jaxtune.checkpoints.open_model import open_model
from jaxtune.errors import JaxtuneError


def test_a_directory_is_opened_with_its_tensors_and_its_chat(tiny_chat):
    opened = open_model(str(tiny_chat))
    assert opened.directory == opened.source.path == tiny_chat
    assert "model.embed_tokens.weight" in opened.source.names()
    assert opened.chat.tokenizer.decode(opened.chat.tokenizer.encode("two words")) == "two words"
    assert opened.chat is opened.chat


def test_a_damaged_tokenizer_is_an_error_of_the_chat_alone(tiny_chat, tmp_path):
    for file in tiny_chat.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text("{")
    opened = open_model(tmp_path)
    assert opened.source.names()
    with pytest.raises(JaxtuneError, match=r"tokenizer\.json:1: invalid JSON"):
        _ = opened.chat


def test_a_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(JaxtuneError, match="nowhere: no such file or directory"):
        open_model(tmp_path / "nowhere")


def test_the_commit_is_that_of_the_snapshot_in_the_cache(tiny_chat, tmp_path):
    commit = "0123456789abcdef" * 2 + "0" * 8
    for name, expected in ((commit, commit), ("main", ""), ("0" * 39, "")):
        snapshot = tmp_path / "snapshots" / name
        snapshot.parent.mkdir(exist_ok=True)
        snapshot.symlink_to(tiny_chat)
        assert open_model(snapshot).commit == expected
    assert open_model(tiny_chat).commit == ""
