"""Embedding and head: tied as the files have them, untied on request, and enlarged."""

import json
import shutil

import numpy as np
import pytest
import torch
from oracles import assert_same_logits, load_torch, random_tokens, relative, torch_logits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import jaxtune
from jaxtune.adapters.define import define
from jaxtune.adapters.projections.lora import Lora
from jaxtune.cli import main
from jaxtune.config import resolve
from jaxtune.errors import JaxtuneError
from jaxtune.generation.sampling import Sampling
from jaxtune.planning.plan import model_config

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENS = random_tokens(1, 2, 12)


@pytest.fixture
def tied(tiny, tmp_path):
    """Copies a checkpoint that config.json ties, with other tensors in it."""

    def make(change):
        directory = tmp_path / "tied"
        shutil.copytree(tiny("qwen2", tie_word_embeddings=True), directory)
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory

    return make


def other_head(tensors):
    torch.manual_seed(3)
    tensors[HEAD] = 0.2 * torch.randn_like(tensors[EMBEDDING])


def written_config(directory):
    return json.loads((directory / "config.json").read_text())


def warnings_of_jaxtune(caplog):
    found = (record for record in caplog.records if record.levelname == "WARNING")
    return [record.getMessage() for record in found if record.name.startswith("jaxtune")]


def test_a_separate_head_is_used_even_if_config_json_ties_it(tied, tmp_path, caplog):
    directory = tied(other_head)
    theirs = torch_logits(load_torch(directory), TOKENS)
    model = jaxtune.load(directory, dtype="float32", progress=False)
    (warning,) = warnings_of_jaxtune(caplog)
    assert "another lm_head.weight" in warning
    assert_same_logits(model.logits(TOKENS), theirs)
    # Every export says what it holds, and a plan sees what a run sees.
    saved = model.save_pretrained(tmp_path / "saved")
    converted = jaxtune.convert(directory, tmp_path / "converted", dtype="float32", progress=False)
    quantized = jaxtune.convert(directory, tmp_path / "nf4", quantize="nf4", progress=False)
    for written in (saved, converted, quantized):
        assert written_config(written)["tie_word_embeddings"] is False
    for written in (saved, converted):
        model, info = AutoModelForCausalLM.from_pretrained(written, output_loading_info=True)
        assert not any(info.values())
        assert relative(torch_logits(model, TOKENS), theirs) == 0
    head = load_file(directory / "model.safetensors")[HEAD]
    assert torch.equal(load_file(quantized / "model.safetensors")[HEAD], head.bfloat16())
    config = resolve({"model": {"path": str(directory)}})
    assert model_config(config.model)["tie_word_embeddings"] is False


def test_an_equal_head_stays_tied(tied, tmp_path, caplog):
    directory = tied(lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    written = jaxtune.convert(directory, tmp_path / "out", progress=False)
    assert written_config(written)["tie_word_embeddings"] is True
    assert HEAD not in load_file(written / "model.safetensors")
    assert not warnings_of_jaxtune(caplog)


def test_the_head_alone_is_the_embedding_as_well(tied):
    directory = tied(lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    ours = jaxtune.load(directory, dtype="float32", progress=False).logits(TOKENS)
    assert_same_logits(ours, torch_logits(load_torch(directory), TOKENS))


def test_layers_beyond_num_hidden_layers_are_logged(tiny, tmp_path, caplog):
    directory = shutil.copytree(tiny("llama"), tmp_path / "model")
    config = written_config(directory) | {"num_hidden_layers": 2}
    (directory / "config.json").write_text(json.dumps(config))
    ours = jaxtune.load(directory, dtype="float32", progress=False).logits(TOKENS)
    assert_same_logits(ours, torch_logits(load_torch(directory), TOKENS))
    (warning,) = warnings_of_jaxtune(caplog)
    assert "9 tensor(s) are of a layer beyond the num_hidden_layers of config.json (2)" in warning


def test_a_missing_head_is_named_with_the_key_that_ties_it(tied):
    directory = tied(lambda tensors: None)
    config = written_config(directory) | {"tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(JaxtuneError, match=r'lm_head.weight; .*set "tie_word_embeddings"'):
        jaxtune.load(directory, progress=False)


def test_convert_unties_and_enlarges(tiny, tmp_path, capsys):
    source = tiny("qwen2", tie_word_embeddings=True)
    target = tmp_path / "untied"
    command = ["convert", "--from", str(source), "--to", str(target), "--dtype", "float32"]
    main([*command, "--untie", "--vocab-size", "168"])
    config = written_config(target)
    assert (config["tie_word_embeddings"], config["vocab_size"]) == (False, 168)
    model = load_torch(target)
    logits, before = torch_logits(model, TOKENS), torch_logits(load_torch(source), TOKENS)
    assert_same_logits(logits[..., :160], before)
    embedding, tensors = load_file(source / "model.safetensors")[EMBEDDING], model.state_dict()
    for name in (EMBEDDING, HEAD):
        assert torch.equal(tensors[name][:160], embedding)
        np.testing.assert_allclose(tensors[name][160:], embedding.mean(0).expand(8, -1), atol=1e-7)
    define(config, "float32", Lora(targets=("lm_head",)))
    ours = jaxtune.load(target, dtype="float32", progress=False)
    assert_same_logits(ours.logits(TOKENS + 8), torch_logits(model, TOKENS + 8))


def test_a_vocabulary_can_only_be_enlarged(tiny, tmp_path):
    with pytest.raises(JaxtuneError, match=r"of 100 tokens is smaller .* 160"):
        jaxtune.convert(tiny("qwen2"), tmp_path / "out", vocab_size=100)
    assert not (tmp_path / "out").exists()


def test_only_a_whole_vocabulary_grows(tied, tmp_path):
    directory = tied(lambda tensors: tensors.update({HEAD: tensors[EMBEDDING][:50].clone()}))
    with pytest.raises(JaxtuneError, match=r"has 160 rows, but lm_head.weight is for 50 tokens"):
        jaxtune.convert(directory, tmp_path / "out", vocab_size=170)
    tensors = load_file(directory / "model.safetensors")
    del tensors[HEAD]
    save_file(tensors, directory / "model.safetensors")
    config = written_config(directory)
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 150}))
    with pytest.raises(JaxtuneError, match=r'"vocab_size" of config.json is for 150 tokens'):
        jaxtune.convert(directory, tmp_path / "out", vocab_size=170)


def test_invalid_ids_and_sampling_options_are_rejected(tiny):
    model = jaxtune.load(tiny("llama"), dtype="float32", progress=False)
    for tokens, options, message in (
        ([[1, 2], [3]], {}, "tokens: token ids must form an array"),
        ([[]], {}, "not of shape"),
        ([[1, 2]], {"segment_ids": [[1]]}, "segment_ids have shape"),
        ([[1, 2]], {"positions": [[0, 1, 2]]}, "positions have shape"),
    ):
        with pytest.raises(JaxtuneError, match=message):
            model.logits(tokens, **options)
    for prompts, sampling, message in (
        ([1, 2], Sampling(), "prompt 1 is not a list of token ids"),
        ([[[1]]], Sampling(), "prompt 1 is not a list of token ids"),
        ([[]], Sampling(), "prompt 1 has no tokens"),
        ([[1]], Sampling(float("nan")), "temperature"),
        ([[1]], Sampling(float("inf")), "temperature"),
        ([[1]], Sampling(1.0, seed=2**31), "seed=2147483648 is not within"),
    ):
        with pytest.raises(JaxtuneError, match=message):
            model.generate_tokens(prompts, 1, sampling)
    rows = [[1, 2], [3, 4]]
    expected = model.generate_tokens(rows, 2, Sampling())
    assert model.generate_tokens(np.array(rows), 2, Sampling()) == expected


def test_ids_outside_the_vocabulary_are_rejected(tiny, tmp_path):
    model = jaxtune.load(tiny("llama"), dtype="float32", progress=False)
    sampling = {"max_new_tokens": 2}
    for token, advice in ((160, "; `jaxtune convert --vocab-size N`"), (-1, "$")):
        message = rf"token id {token} is outside .* vocabulary \(ids 0 to 159\){advice}"
        with pytest.raises(JaxtuneError, match=f"^tokens: {message}"):
            model.logits([[1, token]])
        with pytest.raises(JaxtuneError, match=f"^prompt 2: {message}"):
            model.generate([[1, 2], [3, token]], **sampling)
    with pytest.raises(JaxtuneError, match="token ids must be integers, not float"):
        model.logits([[1.0, 2.5]])
    directory = shutil.copytree(tiny("llama"), tmp_path / "model")
    config = written_config(directory)
    for key, use in (
        ("eos_token_id", lambda model: model.generate([[1, 2]], **sampling)),
        ("pad_token_id", lambda model: None),
    ):
        (directory / "config.json").write_text(json.dumps(config | {key: 160}))
        with pytest.raises(JaxtuneError, match=f"{key}.*ids 0 to 159"):
            use(jaxtune.load(directory, progress=False))
