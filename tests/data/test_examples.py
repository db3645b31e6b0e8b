"""Rows become tokens and shifted targets; what cannot be learned from is refused by name."""

import numpy as np
import pytest
from loading import load_examples

from jaxtune.data import IGNORE, Examples
from jaxtune.errors import JaxtuneError

BOS, EOS = 0, 1


def chat(answer="yes", question="q"):
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def tokenized(tokens, labels=None, **more):
    return {"input_ids": tokens, "labels": tokens if labels is None else labels, **more}


def targets_of(tokenizer, examples, index=0):
    return [
        "" if target == IGNORE else tokenizer.decode([target]) for target in examples.targets[index]
    ]


def test_pretokenized_rows_are_shifted_by_one(jsonl):
    path = jsonl(tokenized([5, 6, 7, 8], [IGNORE, IGNORE, 7, 9], attention_mask=[1] * 4))
    examples = load_examples(path, tokenizer=None, max_length=4)
    assert examples.tokens[0].tolist() == [5, 6, 7, 8]
    assert examples.targets[0].tolist() == [IGNORE, 7, 9, IGNORE]
    assert examples.tokens[0].dtype == examples.targets[0].dtype == np.int32
    assert examples.places == [f"{path}:1"]
    assert (examples.token_count, examples.target_count) == (4, 2)


def test_prompt_and_completion(deepseek, jsonl):
    path = jsonl({"prompt": "The capital of France is", "completion": " Paris."})
    examples = load_examples(path, tokenizer=deepseek, max_length=64)
    bos = [BOS] if deepseek("x")["input_ids"][0] == BOS else []
    whole = deepseek("The capital of France is Paris.", add_special_tokens=False)["input_ids"]
    assert examples.tokens[0].tolist() == [*bos, *whole, EOS]
    assert targets_of(deepseek, examples) == [
        *[""] * (len(bos) + 4),
        *(" Paris", ".", "<｜end▁of▁sentence｜>", ""),
    ]


def test_a_token_across_the_end_of_the_prompt_is_a_target(deepseek, jsonl):
    path = jsonl({"prompt": "Answer: ", "completion": "yes"})
    examples = load_examples(path, tokenizer=deepseek, max_length=64)
    assert targets_of(deepseek, examples)[-3:] == [" yes", "<｜end▁of▁sentence｜>", ""]


@pytest.mark.parametrize("adds", [("bos",), ("eos",), ("bos", "eos")])
def test_special_tokens_are_added_as_the_tokenizer_does_and_once(deepseek, jsonl, adds):
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    single = " ".join([*["B"] * ("bos" in adds), "$A", *["E"] * ("eos" in adds)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=deepseek.backend_tokenizer.from_str(deepseek.backend_tokenizer.to_str()),
        bos_token=deepseek.bos_token,
        eos_token=deepseek.eos_token,
    )
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single.replace("B", deepseek.bos_token).replace("E", deepseek.eos_token),
        special_tokens=[(deepseek.bos_token, BOS), (deepseek.eos_token, EOS)],
    )
    path = jsonl(
        {"prompt": "a", "completion": " b"},
        {"prompt": "a", "completion": " b" + deepseek.eos_token},
    )
    examples = load_examples(path, tokenizer=tokenizer, max_length=64)
    a, b = deepseek("a b", add_special_tokens=False)["input_ids"]
    bos = [BOS] * ("bos" in adds)
    assert examples.tokens[0].tolist() == [*bos, a, b, EOS]
    assert examples.targets[0].tolist() == [*[IGNORE] * len(bos), b, EOS, IGNORE]
    # A completion that brings its EOS gets no second one.
    assert examples.tokens[1].tolist() == examples.tokens[0].tolist()


def test_messages_with_the_checkpoints_and_another_template(chatml, templates, jsonl, tmp_path):
    path = jsonl(chat("好的 🎉"), chat())
    examples = load_examples(path, tokenizer=chatml, max_length=64)
    kept = [t for t in examples.targets[0] if t != IGNORE]
    assert chatml.decode(kept) == "好的 🎉<|im_end|>"
    template = tmp_path / "v3.jinja"
    template.write_text(templates["v3"], encoding="utf-8")
    examples = load_examples(path, tokenizer=chatml, max_length=64, chat_template=str(template))
    assert chatml.decode(examples.tokens[1]) == (
        "<｜begin▁of▁sentence｜><｜User｜>q<｜Assistant｜>yes<｜end▁of▁sentence｜>"
    )


def test_long_examples_are_refused_dropped_or_truncated(jsonl):
    path = jsonl(tokenized([1, 2, 3]), tokenized([1, 2, 3, 4, 5]))

    def load(**knobs):
        return load_examples(path, tokenizer=None, **knobs)

    with pytest.raises(JaxtuneError, match=r":2: 5 tokens exceed data\.max_length=4; .*too_long"):
        load(max_length=4)
    dropped = load(max_length=4, too_long="drop")
    assert (len(dropped), dropped.dropped, dropped.truncated) == (1, 1, 0)
    cut = load(max_length=4, too_long="truncate")
    assert (len(cut), cut.dropped, cut.truncated) == (2, 0, 1)
    assert cut.tokens[1].tolist() == [1, 2, 3, 4]
    assert cut.targets[1].tolist() == [2, 3, 4, IGNORE]
    with pytest.raises(JaxtuneError, match=r"all 2 rows exceed data\.max_length=2"):
        load(max_length=2, too_long="drop")
    with pytest.raises(JaxtuneError, match=r'data\.too_long="\w+" is unknown'):
        load(max_length=4, too_long="cut")


def test_truncation_that_leaves_no_target_is_refused(jsonl):
    path = jsonl(tokenized([1, 2, 3, 4], [IGNORE, IGNORE, IGNORE, 4]))
    with pytest.raises(JaxtuneError, match=r":1: no target tokens within data\.max_length=3"):
        load_examples(path, tokenizer=None, max_length=3, too_long="truncate")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (tokenized([1, 2], [IGNORE, IGNORE]), "no target tokens, nothing to train on"),
        (tokenized([1, 2], [1, IGNORE]), "no target"),  # the first token follows nothing
        (tokenized([1]), "no target"),
        (tokenized([], []), "no target"),
        (tokenized([1, 10]), r"input_ids contains 10, .* vocabulary \(ids 0 to 9\)"),
        (tokenized([1, -1]), "input_ids contains -1"),
        (tokenized([1, 2], [1, 10]), "labels contains 10"),
        (tokenized([1, 2], [1, -1]), "labels contains -1"),
        (tokenized([1, 10**30]), "input_ids contains 1000000"),
        (tokenized([1, 2], [1, 2, 3]), "input_ids and labels differ in length: 2 and 3"),
        (tokenized([1, 2.0]), "input_ids must be a list of integers"),
        (tokenized([1, True]), "input_ids must be a list of integers"),
        (tokenized("12"), "input_ids must be a list of integers"),
        (tokenized([1, 2], attention_mask=[0, 1]), "remove the padding"),
        ({"x": "x"}, r"the keys x match no known format .*messages \(messages\)"),
        ({"prompt": "x", "completions": "y"}, 'did you mean "completion"'),
        ({"prompt": "x", "completion": None}, "the keys prompt match no known format"),
        ({}, "the keys none match no known format"),
        (
            {"messages": [], "prompt": "x", "completion": "y"},
            "messages, prompt, completion match several formats",
        ),
        (chat(), "text requires a tokenizer"),
        ({"prompt": "x", "completion": "y"}, "text requires a tokenizer"),
    ],
)
def test_bad_rows_are_named(jsonl, row, reason):
    path = jsonl(row)
    with pytest.raises(JaxtuneError, match=r"rows\.jsonl:1: .*" + reason):
        load_examples(path, tokenizer=None, max_length=8, vocab_size=10)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (chat(""), r"messages\[1\] is an empty assistant turn"),
        ({"prompt": "x", "completion": " "}, "empty completion"),
        ({"prompt": ["x"], "completion": "y"}, "prompt must be a string, not list"),
        ({"prompt": "x", "completion": "\ud83d"}, "an unpaired surrogate"),
    ],
)
def test_bad_text_is_named(chatml, jsonl, row, reason):
    path = jsonl({"prompt": "a", "completion": "b"} if "prompt" in row else chat(), row)
    with pytest.raises(JaxtuneError, match=r"rows\.jsonl:2: .*" + reason):
        load_examples(path, tokenizer=chatml, max_length=64)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(chatml, jsonl):
    with pytest.raises(JaxtuneError, match=r"rows\.jsonl:1: .*convert --vocab-size"):
        load_examples(jsonl(chat()), tokenizer=chatml, max_length=64, vocab_size=100)


def test_a_tokenizer_without_a_template_says_what_to_set(deepseek, jsonl):
    with pytest.raises(JaxtuneError, match=r"rows\.jsonl:1: .*set data\.chat_template"):
        load_examples(jsonl(chat()), tokenizer=deepseek, max_length=64)


def test_a_file_has_rows_of_one_form(chatml, jsonl):
    path = jsonl(chat(), {"prompt": "x", "completion": "y"})
    with pytest.raises(
        JaxtuneError, match=r":2: format prompt-completion, but .*:1 has format messages"
    ):
        load_examples(path, tokenizer=chatml, max_length=64)


def test_an_empty_file_is_refused(jsonl):
    with pytest.raises(JaxtuneError, match=r"rows\.jsonl: no examples$"):
        load_examples(jsonl(""), tokenizer=None, max_length=8)


def test_unused_keys_are_logged(jsonl):
    path = jsonl(tokenized([1, 2], id=7), tokenized([1, 2], source="x"))
    assert load_examples(path, tokenizer=None, max_length=8).unread == ("id", "source")


def test_the_fingerprint_sees_every_token_target_and_boundary():
    def digest(*pairs):
        tokens = [np.asarray(t, np.int32) for t, _ in pairs]
        targets = [np.asarray(y, np.int32) for _, y in pairs]
        return Examples(tokens, targets, ["x"] * len(pairs)).fingerprint()

    one = digest(([1, 2], [2, IGNORE]), ([3, 4], [4, IGNORE]))
    assert len(bytes.fromhex(one)) == 32
    assert one == digest(([1, 2], [2, IGNORE]), ([3, 4], [4, IGNORE]))
    others = {
        digest(([1, 2], [3, IGNORE]), ([3, 4], [4, IGNORE])),
        digest(([1, 5], [2, IGNORE]), ([3, 4], [4, IGNORE])),
        digest(([3, 4], [4, IGNORE]), ([1, 2], [2, IGNORE])),
        digest(([1, 2, 2, IGNORE], [3, 4, 4, IGNORE])),
    }
    assert len(others | {one}) == 5


def test_saved_data_sets_give_what_their_jsonl_gives(chatml, jsonl, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [chat("one"), chat("two")]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    saved = load_examples(tmp_path / "saved", tokenizer=chatml, max_length=64)
    file = load_examples(jsonl(*rows), tokenizer=chatml, max_length=64)
    assert saved.fingerprint() == file.fingerprint()
