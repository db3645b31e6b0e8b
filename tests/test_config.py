"""The config tree: accepted values, errors for all others, and an effect of every option."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest

import jaxtune
from jaxtune import JaxtuneError, config
from jaxtune.checkpoints import huggingface
from jaxtune.checkpoints.load_model import load_model
from jaxtune.checkpoints.tokenizer import load_tokenizer
from jaxtune.config import OPTIONS, default, load_file, resolve
from jaxtune.runs.directory import RunDirectory
from jaxtune.training import train as training
from jaxtune.training.durations import Timeline
from jaxtune.training.evaluation import held_out_batches
from jaxtune.training.run_summary import SplitSummary, summarize
from jaxtune.training.setup import set_up

# The keys that users' files and scripts rely on.
PROMISED = {
    "model": {"path"},
    "data": {"train", "eval", "max_length", "packing", "shuffle"},
    "adapter": {"method", "rank", "alpha", "dropout", "targets", "init_from"},
    "quantize": {"format"},
    "training": {"steps", "batch_size", "accumulation", "seed", "dtype", "remat"},
    "optimizer": {"name", "learning_rate", "schedule", "warmup_steps", "weight_decay", "clip_norm"}
    | {"b1", "b2", "eps"},
    "checkpoint": {"every"},
    "evaluation": {"every"},
    "logging": {"every"},
    "mesh": {"data", "fsdp", "tensor", "expert", "sequence"},
}


def test_the_documented_keys_exist_and_every_option_is_explained():
    for section, names in PROMISED.items():
        assert {f"{section}.{name}" for name in names} <= set(OPTIONS)
    assert all(len(option.help) > 10 for option in OPTIONS.values())


def test_every_option_of_training_is_in_its_page():
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    sections = ("training", "optimizer", "checkpoint", "evaluation", "logging", "profile")
    for key in OPTIONS:
        if key.split(".")[0] in sections:
            assert f"| `{key}` |" in page, key


def test_updates_of_a_profile_are_numbers_or_text():
    for steps in ((10, 20), "10,20", ("10", "20")):
        assert resolve({"profile": {"steps": steps}}).profile.steps == ("10", "20")
    assert resolve({}, ["profile.steps=10,20"]).profile.steps == ("10", "20")


def test_arguments_of_a_template_are_an_object_or_json_text():
    given = {"enable_thinking": False, "a": [1, None]}
    text = '{"a": [1, null], "enable_thinking": false}'
    for value in (given, text, json.dumps(given), ml_collections.ConfigDict(given)):
        assert resolve({"data": {"chat_template_kwargs": value}}).data.chat_template_kwargs == text
    assert resolve({}, ["data.chat_template_kwargs={}"]).data.chat_template_kwargs == ""
    for value in ("fast", "[1]", 5, {"a": object()}):
        with pytest.raises(JaxtuneError, match=r"data\.chat_template_kwargs takes a JSON object"):
            resolve({"data": {"chat_template_kwargs": value}})


def test_the_default_tree_resolves_to_itself():
    assert resolve(default()) == resolve({})
    for key, option in OPTIONS.items():
        section, name = key.split(".")
        assert getattr(getattr(resolve({}), section), name) == option.default


def test_overrides_win_and_have_the_type_of_their_option():
    changed = resolve(
        {"adapter": {"rank": 4}},
        [
            "adapter.rank=8",
            "adapter.alpha=16",
            "data.packing=false",
            "adapter.targets=q_proj,v_proj",
            "model.path=123",
            "optimizer.learning_rate=1e-3",
        ],
    )
    assert changed.adapter.rank == 8
    assert changed.adapter.alpha == 16.0 and isinstance(changed.adapter.alpha, float)
    assert changed.data.packing is False
    assert changed.adapter.targets == ("q_proj", "v_proj")
    assert changed.model.path == "123"
    assert changed.optimizer.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.rnak=8", 'unknown config key "adapter.rnak"; did you mean "adapter.rank"?'),
        ("adapter.rank=eight", "adapter.rank takes int, not 'eight'"),
        ("adapter.rank=8.5", "adapter.rank takes int, not 8.5"),
        ("adapter.rank=0", "adapter.rank is at least 1, not 0"),
        ("adapter.rank=True", "adapter.rank takes int, not True"),
        ("adapter.dropout=1.5", "adapter.dropout is at most 0.999, not 1.5"),
        ("data.packing=perhaps", "data.packing takes true or false, not 'perhaps'"),
        ("optimizer.learning_rate=1e999", "optimizer.learning_rate takes a finite number, not inf"),
        (
            "training.dtype=float8",
            'training.dtype="float8" is unknown; did you mean "float32"? '
            "(known: bfloat16, float16, float32)",
        ),
        ("adapter.targets=", "adapter.targets takes one or more names, not ''"),
        ("adapter.rank", "--config.adapter.rank needs a value: --config.adapter.rank=…"),
        (
            "training.batch_size=7",
            "training.batch_size=7 does not divide into training.accumulation=2 micro-batches; the "
            "nearest numbers that divide it: 1, 7",
        ),
    ],
)
def test_a_bad_override_is_refused_by_name(override, message):
    with pytest.raises(JaxtuneError) as error:
        resolve({"training": {"accumulation": 2}}, [override])
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.targets=a,\0", "adapter.targets contains a NUL character: '\\x00'"),
        ("model.path=\ud800", "model.path is not UTF-8: '\\ud800'"),
        ("mesh.data=0", "mesh.data is -1 or at least 1, not 0"),
        ("training.seed=9223372036854775808", "training.seed is at most 9223372036854775807, not "),
        ("training.steps=2147483648", "training.steps is at most 2147483647, not 2147483648"),
        ("training.tokens=5k", "training.tokens takes int, not '5k'; write 5000"),
        ("training.tokens=1e6", "training.tokens takes int, not 1000000.0; write 1000000"),
        ("training.epochs=1e308", "training.epochs is at most 1000000, not 1e+308"),
        ("optimizer.learning_rate=1e39", "optimizer.learning_rate is at most 3.4e+38, not 1e+39"),
        ("evaluation.every=" + "9" * 5000, "evaluation.every is at most 10¹⁵, not '9999"),
        ("training.steps=" + "9" * 5000, "training.steps takes int, not '9999"),
        ("mesh.data=1" + "+1" * 3000, "mesh.data takes int, not '1+1+"),
        ("adapter.targets=" + "(" * 5000, "adapter.targets: a name of more than 1000 characters"),
        ('data.chat_template_kwargs={"a":NaN}', "data.chat_template_kwargs takes a JSON object"),
        ("data.chat_template_kwargs=" + "[" * 100_000, "data.chat_template_kwargs takes a JSON"),
    ],
    ids=lambda text: ascii(text[:30]),
)
def test_an_extreme_override_is_refused_in_one_short_line(override, message):
    with pytest.raises(JaxtuneError) as error:
        resolve({}, [override])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value) and len(str(error.value).encode()) < 400


@pytest.mark.parametrize("value", ["None", "1e400", "0x10", "1_0", "10,20"])
def test_names_are_text_also_if_they_read_as_numbers(value):
    names = [key for key, option in OPTIONS.items() if option.names]
    assert len(names) > 9
    for key in names:
        assert OPTIONS[key].check(key, OPTIONS[key].parse(key, value)) == tuple(value.split(","))


def test_several_names_may_be_a_literal():
    for text in ("['q_proj','v_proj']", '("q_proj", "v_proj")', "q_proj, v_proj"):
        assert resolve({}, [f"adapter.targets={text}"]).adapter.targets == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["adapter.method=esft", "adapter.rank=64"],
            "adapter.rank=64 has no effect with adapter.method=esft: lora, dora, pissa, vera read "
            "it; esft reads expert_scores, expert_score, expert_threshold, expert_sample",
        ),
        (["adapter.method=prompt", "adapter.rank=64"], "no effect with adapter.method=prompt"),
        (["adapter.method=full", "adapter.rank=64"], "full reads freeze"),
        (["adapter.virtual_tokens=9"], "prompt, ptuning, prefix read it; lora reads rank, alpha"),
        (["adapter.method=ia3", "adapter.new_tokens=2"], "no effect with adapter.method=ia3"),
        (["adapter.method=full", "optimizer.lora_plus_ratio=2"], "lora, dora, pissa read it"),
        (
            ["quantize.format=nf4", "quantize.group_size=32"],
            "no effect with quantize.format=nf4: int4 reads it; nf4 reads modules, double",
        ),
        (["quantize.double=false"], "no effect without quantize.format: nf4 reads it"),
        (
            ["optimizer.name=sgd", "optimizer.b2=0.9"],
            "optimizer.b2=0.9 has no effect with optimizer.name=sgd: adamw, lion read it; sgd "
            "reads b1, moment_dtype",
        ),
        (["optimizer.decay_steps=3"], "cosine reads no options of its own"),
    ],
)
def test_an_override_without_effect_is_refused(overrides, message):
    with pytest.raises(JaxtuneError) as error:
        resolve({}, overrides)
    assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(JaxtuneError):  # of a resolved config too, as when a run is resumed
        resolve(resolve({}), overrides)


def test_config_values_without_effect_are_one_warning(caplog):
    mine = default()
    mine.adapter.rank = 4
    mine.adapter.targets = ("q_proj",)
    mine.optimizer.b2 = 0.9
    resolve(mine)
    assert not caplog.records
    resolve(mine, ["adapter.method=esft", "optimizer.name=sgd"])
    (record,) = caplog.records
    assert record.getMessage() == (
        "config values without effect: adapter.rank=4, adapter.targets=q_proj (with "
        "adapter.method=esft); optimizer.b2=0.9 (with optimizer.name=sgd)"
    )


def test_the_length_set_last_replaces_the_others(caplog):
    caplog.set_level("INFO", "jaxtune")
    mine = default()
    mine.training.epochs = 2
    mine.training.steps = 100
    assert resolve(mine).training.epochs == 0.0
    mine.training.epochs = 3
    assert resolve(mine).training == resolve({"training": {"epochs": 3}}).training
    assert not caplog.records
    changed = resolve(mine, ["training.tokens=500"]).training
    assert (changed.epochs, changed.tokens) == (0.0, 500)
    assert "training.tokens=500 replaces training.epochs=3.0 of the config" in caplog.text
    for lengths in (
        ["training.steps=4", "training.epochs=2"],
        ["training.epochs=2", "training.tokens=9"],
    ):
        with pytest.raises(JaxtuneError, match="a run has one length"):
            resolve({}, lengths)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"adaptr": {"rank": 8}}, 'unknown config section "adaptr"; did you mean "adapter"?'),
        ({"adapter": 3}, 'config section "adapter" has named options, not 3'),
        ({"adapter": {"rank": "8"}}, "adapter.rank takes int, not '8'"),
        ([1], "a config is a tree of sections, not [1]"),
    ],
)
def test_a_bad_tree_is_refused_by_name(tree, message):
    with pytest.raises(JaxtuneError) as error:
        resolve(tree)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def get_config():\n    return 1 / 0\n", ":2: ZeroDivisionError: division by zero"),
        ("def get_config(:\n", ":1: SyntaxError: "),
        ("x = 1\n", "AttributeError: module 'jaxtune_config_file' has no attribute 'get_config'"),
        ("def get_config():\n    pass\n", ": get_config() returns None instead of a config"),
        ("import sys\nsys.exit(3)\n", ":2: SystemExit: 3"),
        ("def get_config(): return get_config()\n", ":1: RecursionError: "),
        ("x = 1\0\n", "Error: source code string cannot contain null bytes"),  # type by version
        ("get_config = 3\n", ": TypeError: "),
        ("def get_config(): return {3: {4: 5}}\n", ': unknown config section "3"'),
        ("def get_config(): return {'adapter': {5: 3}}\n", ': unknown config key "adapter.5"'),
        (
            "import itertools\ndef get_config():\n"
            "    return {'adapter': {'targets': itertools.count()}}\n",
            ":3: adapter.targets takes one or more names, not count(0)",
        ),
        (
            "class A:\n    def __repr__(self): raise ValueError\ndef get_config():\n"
            "    return {'adapter': {'rank': A()}}\n",
            ":4: adapter.rank takes int, not a value of type A",
        ),
        (
            "def get_config():\n    return {'training': {'steps': 10**5000}}\n",
            ":2: training.steps is at most 2147483647, not an integer of 16610 bits",
        ),
        (
            "def get_config():\n    return {'adapter': 3}\n",
            ':2: config section "adapter" has named options, not 3',
        ),
        (
            "from jaxtune import config\n\ndef get_config():\n    c = config.default()\n"
            "    c.adapter.rnak = 8\n    return c\n",
            ':5: unknown config key "adapter.rnak"; did you mean "adapter.rank"?',
        ),
    ],
)
def test_a_broken_config_file_is_named_with_its_line(tmp_path, source, message):
    path = tmp_path / "mine.py"
    path.write_text(source)
    with pytest.raises(JaxtuneError) as error:
        load_file(path)
    text = str(error.value)
    assert text.startswith(str(path)) and message in text and "\n" not in text


LINES = [
    # (lines of get_config, the line that is named, the message)
    (["c.trianing.steps = 1"], 1, 'unknown config section "trianing"; did you mean "training"?'),
    (["c.adapter.rank = 4", "c.adapter.rank = 0"], 2, "adapter.rank is at least 1, not 0"),
    (["t = c.training", "t.steps = 1", "t.batch_size = 'x'"], 3, "training.batch_size takes int"),
    (
        ["t = c.training", "t.stepz = 1"],
        2,
        'unknown config key "training.stepz"; did you mean "tra',
    ),
    (["c.adapter.update(rank=-1)"], 1, "adapter.rank is at least 1, not -1"),
    (["c['adapter']['rank'] = 0"], 1, "adapter.rank is at least 1"),
    (["print(c.adapter.rnak)"], 1, 'unknown config key "adapter.rnak"'),
    (["c = {", "  'adapter': {'rank': 4,", "  'alpha': 'x'}}"], 3, "adapter.alpha takes float"),
    (["c = {'adapter':", "  {'rnak': 4}}"], 2, 'unknown config key "adapter.rnak"; did you mean'),
    (["c = {'data': {},", " 'adaptr': {}}"], 2, 'unknown config section "adaptr"; did you mean'),
    (["c.adapter.method = 'lara'"], 1, 'adapter.method="lara" is unknown; did you mean "lora"?'),
]


@pytest.mark.parametrize("base", [False, True], ids=["", "in a base"])
@pytest.mark.parametrize("relative", [False, True], ids=["", "relative"])
@pytest.mark.parametrize(("lines", "line", "message"), LINES)
def test_errors_of_a_config_file_have_its_line(
    tmp_path, monkeypatch, lines, line, message, relative, base
):
    body = "".join(f"    {text}\n" for text in ["c = config.default()", *lines, "return c"])
    bad = "from jaxtune import config\ndef get_config():\n" + body
    (tmp_path / "bases").mkdir()
    path = tmp_path / "bases" / "bad.py"
    path.write_text(bad)
    monkeypatch.chdir(tmp_path)
    shown = Path("bases/bad.py") if relative else path
    loaded = shown
    if base:
        loaded = Path("mine.py")
        loaded.write_text(
            "from jaxtune import config\n\ndef get_config():\n"
            f"    c = config.load_file({str(shown)!r})\n    c.adapter.alpha = 1.0\n    return c\n"
        )
    with pytest.raises(JaxtuneError) as error:
        load_file(loaded)
    assert str(error.value).startswith(f"{shown}:{line + 3}: {message}")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_missing_config_file_is_named_with_the_closest(tmp_path):
    (tmp_path / "quickstart.py").write_text("")
    with pytest.raises(JaxtuneError, match=r'quikstart\.py: no such config file; did you mean "qu'):
        load_file(tmp_path / "quikstart.py")


def test_the_frozen_json_gives_back_the_config(tmp_path):
    original = resolve({}, ["adapter.targets=q_proj,v_proj", "optimizer.learning_rate=3e-4"])
    (tmp_path / "config.json").write_text(original.to_json())
    assert config.from_json(tmp_path / "config.json") == original


def test_a_run_of_another_version_has_defaults_or_is_refused_in_one_line(tmp_path):
    original = resolve({}, ["adapter.rank=3"])
    tree = json.loads(original.to_json())
    del tree["optimizer"]["decay_steps"]
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert RunDirectory(tmp_path).read_config() == original
    tree["adapter"]["rnak"] = tree["adapter"].pop("rank")
    (tmp_path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(JaxtuneError) as caught:
        RunDirectory(tmp_path).read_config()
    assert str(caught.value) == (
        f'{tmp_path}/config.json: unknown config key "adapter.rnak"; did you mean '
        '"adapter.rank"? (edited, or written by another version of jaxtune)'
    )


# Every option and a value that must change what a run does; names in braces are those of `places`.
# Further overrides apply to both sides, so that the option has something to act on.
ESFT = ("model.path={mixture}", "adapter.method=esft", "adapter.expert_scores={scores}")
PERTURBED = {
    "model.path": ("{other_model}",),
    "model.attention": ("blockwise",),
    "data.train": ("{other_data}",),
    "data.eval": ("{data}", "data.train={other_data}", "data.overlap=keep"),
    "data.eval_split": (3.0, "data.eval=", "data.eval_split=2"),
    "data.overlap": ("keep", "data.eval={repeated}", "data.overlap=drop"),
    "data.format": (
        "text",
        *("data.train={two_forms}", "data.eval=", "data.eval_split=2"),
        "data.format=prompt-completion",
    ),
    "data.targets": ("last", "data.train={two_turns}"),
    "data.reasoning": ("drop", "data.train={reasoned}"),
    "data.empty_reasoning": ("mask", "data.chat_template=qwen3"),
    "data.chat_template_kwargs": ('{{"enable_thinking": false}}', "data.chat_template=qwen3"),
    "data.prompt_templates": ("{wordings}",),
    "data.mask_tokens": (0.5,),
    "data.max_length": (128,),
    "data.packing": (False,),
    "data.shuffle": (False,),
    "data.too_long": ("truncate", "data.max_length=26", "data.too_long=drop"),
    "data.chat_template": ("{template}",),
    "adapter.method": ("full",),
    "adapter.rank": (2,),
    "adapter.alpha": (8.0,),
    "adapter.rslora": (True,),
    "adapter.dropout": (0.5,),
    "adapter.targets": ("v_proj",),
    "adapter.layers": ("1-2",),
    "adapter.rank_pattern": ("q_proj=2",),
    "adapter.alpha_pattern": ("q_proj=2",),
    "adapter.modules_to_save": ("lm_head",),
    "adapter.bias": ("all", "model.path={biased}"),
    "adapter.freeze": ("model.layers.0", "adapter.method=full"),
    "adapter.new_tokens": (3,),
    "adapter.train_tokens": ("!",),
    "adapter.expert_scores": ("{other_scores}", *ESFT),
    "adapter.expert_score": ("gate", *ESFT),
    "adapter.expert_threshold": (0.9, *ESFT),
    "adapter.feedforward": ("up_proj", "adapter.method=ia3"),
    "adapter.virtual_tokens": (3, "adapter.method=prefix"),
    "adapter.prefix_projection": (True, "adapter.method=prefix"),
    "adapter.encoder_hidden_size": (3, "adapter.method=prefix", "adapter.prefix_projection=true"),
    "adapter.prompt_init_text": ("hello", "adapter.method=prompt"),
    "adapter.encoder_reparameterization_type": ("LSTM", "adapter.method=ptuning"),
    "adapter.encoder_num_layers": (
        1,
        "adapter.method=ptuning",
        "adapter.encoder_reparameterization_type=LSTM",
    ),
    "adapter.placement": ("houlsby", "adapter.method=bottleneck"),
    "adapter.reduction_factor": (4.0, "adapter.method=bottleneck"),
    "adapter.activation": ("gelu", "adapter.method=bottleneck"),
    "adapter.scaling": (4.0, "adapter.method=bottleneck"),
    "adapter.init_from": ("{adapter}",),
    "quantize.format": ("int8",),
    "quantize.modules": ("q_proj", "quantize.format=int8"),
    "quantize.double": (False, "quantize.format=nf4"),
    "quantize.group_size": (32, "quantize.format=int4"),
    "quantize.symmetric": (False, "quantize.format=int4"),
    "training.steps": (12,),
    "training.epochs": (2.0,),
    "training.tokens": (500,),
    "training.batch_size": (8,),
    "training.accumulation": (2,),
    "training.seed": (1,),
    "training.dtype": ("float32",),
    "training.remat": ("none",),
    "training.balance_loss": (0.01, "model.path={mixture}", "adapter.targets=o_proj"),
    "training.label_smoothing": (0.1,),
    "training.z_loss": (1e-4,),
    "training.neftune_alpha": (5.0,),
    "training.spike_factor": (3.0,),
    "optimizer.name": ("lion",),
    "optimizer.moment_dtype": ("bfloat16",),
    "optimizer.group_rates": ("lora_B=2x",),
    "optimizer.decay_steps": (3, "optimizer.schedule=wsd"),
    "optimizer.learning_rate": (1e-3,),
    "optimizer.schedule": ("constant",),
    "optimizer.warmup_steps": (3,),
    "optimizer.lora_plus_ratio": (4.0,),
    "optimizer.weight_decay": (0.1,),
    "optimizer.clip_norm": (0.0,),
    "optimizer.b1": (0.8,),
    "optimizer.b2": (0.9,),
    "optimizer.eps": (1e-6,),
    "evaluation.batch_size": (2,),
}
LOOPED = {"checkpoint.every", "checkpoint.keep", "evaluation.every", "logging.every"}
LOOPED |= {"logging.tensorboard", "training.watchdog_minutes"}
LOOPED |= {"profile.steps", "evaluation.generate"}
# Tested in tests/training: test_guard.py, test_stopping.py, test_metrics.py,
# test_continue_from.py; and in tests/faults: test_stalled_saves.py.
ELSEWHERE = {
    "checkpoint.timeout_minutes",
    "training.max_bad_steps",
    "evaluation.stop_metric",
    "evaluation.stop_patience",
}
ELSEWHERE |= {"evaluation.stop_min_change", "logging.wandb", "training.continue_from"}
MESHED = {"mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.expert", "mesh.sequence"}
FETCHED = {"model.revision", "data.revision"}
# What becomes of rows that cannot be used, and where tokenized data is kept: tests/data.
READ = {"data.bad_rows", "data.bad_rows_limit", "data.cache"}
SCORED = {"adapter.expert_sample"}


def test_every_option_is_perturbed_below():
    covered = PERTURBED.keys() | LOOPED | ELSEWHERE | MESHED | FETCHED | SCORED | READ
    assert covered == OPTIONS.keys()


@pytest.fixture(scope="module")
def places(tiny, tiny_chat, tmp_path_factory):
    """Files for configs to name, by the name that `PERTURBED` uses."""
    root = tmp_path_factory.mktemp("places")
    for name, count in (("data", 12), ("other_data", 13)):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"{i}"},
                    {"role": "assistant", "content": "x" * (i % 7 + 1)},
                ]
            }
            for i in range(count)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (root / f"{name}.jsonl").write_text(text)
    for name, rows in _texts(root / "data.jsonl").items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (root / f"{name}.jsonl").write_text(text)
    (root / "wordings.txt").write_text("Say it: {prompt}\n{prompt}, please\n")
    for name, experts in (("scores", (1, 2)), ("other_scores", (3, 4))):
        tables = [
            {str(layer): {str(e): float(e == expert) for e in range(8)} for layer in range(1, 3)}
            for expert in experts
        ]
        content = dict(zip(("token_scores", "gate_scores"), tables, strict=True))
        (root / f"{name}.json").write_text(json.dumps(content))
    (root / "template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_chat)
    get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj"])).save_pretrained(
        root / "adapter"
    )
    return {
        "model": tiny_chat,
        "other_model": tiny("llama", vocab_size=258, num_hidden_layers=2),
        "biased": tiny("qwen2", vocab_size=258),
        "mixture": tiny(
            "deepseek_v2",
            vocab_size=258,
            num_key_value_heads=4,
            moe_intermediate_size=24,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=None,
            kv_lora_rank=28,
            qk_nope_head_dim=12,
            qk_rope_head_dim=16,
            v_head_dim=10,
        ),
        "data": root / "data.jsonl",
        "other_data": root / "other_data.jsonl",
        **{name: root / f"{name}.jsonl" for name in _texts(root / "data.jsonl")},
        "wordings": root / "wordings.txt",
        "template": root / "template.jinja",
        "adapter": root / "adapter",
        "scores": root / "scores.json",
        "other_scores": root / "other_scores.json",
    }


def _texts(data):
    """Rows by the name of the file that holds them."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    asked = [
        {**row, "messages": [{**m, "content": f"{m['content']}?"} for m in row["messages"]]}
        for row in rows
    ]
    return {
        "held_out": asked,
        "repeated": [*asked, *rows[:2]],
        "two_forms": [{"prompt": "a", "completion": f"b{i}", "text": "c" * i} for i in range(1, 9)],
        "two_turns": [{"messages": row["messages"] * 2} for row in rows],
        "reasoned": [
            {
                "messages": [
                    row["messages"][0],
                    {"role": "assistant", "content": "<think>a</think>b"},
                ]
            }
            for row in rows
        ],
    }


# Not overrides: other methods do not read the rank, and overrides replace the length.
TREE = {"adapter": {"rank": 4}, "training": {"steps": 10}}


def _base(places, *overrides):
    return [
        f"model.path={places['model']}",
        f"data.train={places['data']}",
        f"data.eval={places['held_out']}",
        "data.max_length=64",
        "training.batch_size=4",
        *overrides,
    ]


def _digest(tree):
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


class Prepared:
    """What a run resolves to, read off the real objects: the cheap parts first."""

    def __init__(self, overrides):
        self.config = resolve(TREE, overrides)
        self.location = huggingface.resolve_path(self.config.model.path, self.config.model.revision)
        self.source = huggingface.open_source(self.location)
        self.method, self.stored = training.choose_method(self.config.adapter)
        self.setup = set_up(self.config, self.source.config, self.method)

    def description(self):
        tokenizer = load_tokenizer(self.location)
        # A model of the same vocabulary may come without tokenizer files.
        tokenizer = tokenizer or load_tokenizer(Path(os.environ["TOKENIZER"]))
        splits = training.data_reader(self.config, self.source, tokenizer).splits()
        examples, held_out = splits.train, splits.held_out
        loader = training.make_loader(self.config, examples, self.setup.reserved)
        steps = Timeline(loader.order).total_steps(self.config.training)
        return summarize(
            self.setup.with_total_steps(steps),
            SplitSummary(examples, loader),
            SplitSummary(
                held_out,
                held_out_batches(self.config, held_out, self.setup.reserved),
            ),
        )

    def program(self):
        setup = self.setup
        with jax.set_mesh(setup.mesh):
            lowered = setup.train_step().lower(
                setup.like,
                setup.definition.abstract("base", setup.mesh),
                setup.definition.abstract("constants", setup.mesh),
                setup.batch_like(),
            )
        return hashlib.sha256(lowered.as_text().encode()).hexdigest()

    def start(self):
        parts = load_model(
            self.source,
            self.config.training.dtype,
            self.setup.mesh,
            method=self.method,
            stored=self.stored,
            seed=self.config.training.seed,
        )
        return _digest((parts.trainable, parts.constants))

    def differs_from(self, other):
        """Looks for a difference where it is cheap to see first."""
        return (
            self.description() != other.description()
            or self.start() != other.start()
            or self.program() != other.program()
        )


def test_preparing_twice_resolves_to_the_same(places, monkeypatch):
    monkeypatch.setenv("TOKENIZER", str(places["model"]))
    assert not Prepared(_base(places)).differs_from(Prepared(_base(places)))


@pytest.mark.parametrize("key", PERTURBED)
def test_every_option_has_an_effect(places, key, monkeypatch):
    monkeypatch.setenv("TOKENIZER", str(places["model"]))
    value, *others = PERTURBED[key]
    value = value.format(**places) if isinstance(value, str) else value
    others = [other.format(**places) for other in others]
    plain = Prepared(_base(places, *others))
    assert Prepared(_base(places, *others, f"{key}={value}")).differs_from(plain)


def test_a_revision_chooses_the_snapshot_of_a_hub_id(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--tiny"
    for reference, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text("{}")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / reference).write_text(commit)
    assert huggingface.resolve_path("someone/tiny", "").name == "a" * 40
    assert huggingface.resolve_path("someone/tiny", "v2").name == "b" * 40


@pytest.mark.slow
def test_the_options_of_the_loop_show_in_the_run_directory(places, tmp_path):
    def seen(name, *overrides):
        fixed = ["training.steps=6", "checkpoint.every=1", "evaluation.every=2"]
        run = jaxtune.train(resolve(TREE, _base(places, *fixed, *overrides)), tmp_path / name)
        return {
            "checkpoints": [path.name for path in sorted(run.directory.checkpoints.iterdir())],
            "evaluated": [line["step"] for line in run.evaluations()],
            "logged": [line["step"] for line in run.metrics()],
            "tensorboard": (run.path / "tensorboard").is_dir(),
            "profiled": (run.path / "profile").is_dir(),
            "sampled": (run.path / "samples.jsonl").is_file(),
        }

    plain = seen("plain")
    assert plain == {
        "checkpoints": ["5", "6"],
        "evaluated": [2, 4, 6],
        "logged": [1, 2, 3, 4, 5, 6],
        "tensorboard": True,
        "profiled": False,
        "sampled": False,
    }
    for override, consequence in (
        ("checkpoint.every=4", {"checkpoints": ["4", "6"]}),
        ("checkpoint.keep=3", {"checkpoints": ["4", "5", "6"]}),
        ("evaluation.every=3", {"evaluated": [3, 6]}),
        ("logging.every=3", {"logged": [3, 6]}),
        ("logging.tensorboard=false", {"tensorboard": False}),
        ("profile.steps=2,3", {"profiled": True}),
        ("evaluation.generate=2", {"sampled": True}),
    ):
        assert seen(override, override) == plain | consequence


def test_the_mesh_options_split_eight_devices(places):
    script = """
import json, sys
from tests.test_config import Prepared
base = json.loads(sys.argv[1])
for sizes in json.loads(sys.argv[2]):
    prepared = Prepared(base + [f"mesh.{axis}={size}" for axis, size in sizes.items()])
    print(json.dumps([dict(prepared.setup.mesh.shape), prepared.program()]))
"""
    split = [{"data": 8}, {"data": 4, "fsdp": 2}, {"data": 4, "tensor": 2}]
    split += [{"data": 4, "expert": 2}, {"data": 4, "sequence": 2}, {"data": -1}]
    base = _base(places, "training.batch_size=8")
    root = Path(__file__).parent.parent
    output = subprocess.run(
        [sys.executable, "-c", script, json.dumps(base), json.dumps(split)],
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "PYTHONPATH": str(root),
        },
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    shapes, programs = zip(*map(json.loads, output.splitlines()), strict=True)
    full = dict.fromkeys(("data", "fsdp", "tensor", "expert", "sequence"), 1)
    assert list(shapes) == [full | sizes for sizes in split[:-1]] + [full | {"data": 8}]
    assert len(set(programs[:-1])) == len(split) - 1, "each mesh compiles to a program of its own"
    assert programs[-1] == programs[0], "-1 takes all devices that the others leave"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"training": {"step": 6}},
            'unknown config key "training.step"; did you mean "training.st',
        ),
        ({"training": {"steps": "6"}}, "training.steps takes int, not '6'"),
        ({"train": {"steps": 6}}, 'unknown config section "train"; did you mean "training"'),
    ],
)
def test_a_replaced_option_is_checked(sections, message):
    with pytest.raises(JaxtuneError, match=message):
        resolve(default()).replace(**sections)


def test_the_config_of_a_model_is_not_that_of_a_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(JaxtuneError, match="the config of a model, not of a run"):
        jaxtune.Run(tmp_path)


def test_a_run_starts_from_one_adapter():
    both = ["training.continue_from=runs/a", "adapter.init_from=out/a"]
    with pytest.raises(JaxtuneError, match="both give the initial weights; set one"):
        resolve(default(), both)
