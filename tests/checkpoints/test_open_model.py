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
