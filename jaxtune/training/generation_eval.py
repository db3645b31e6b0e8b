"""Generated answers to held-out prompts during a run, and their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune.checkpoints.chat import Chat
from jaxtune.data import Examples
from jaxtune.generation.generate import generate_tokens
from jaxtune.generation.sampling import Sampling
from jaxtune.objectives.cross_entropy import IGNORE
from jaxtune.progress import track
from jaxtune.training.scores import answer_scores, rate_answer
from jaxtune.training.setup import Setup


class Question(NamedTuple):
    """A held-out prompt and its expected answer, as token ids."""

    prompt: list[int]
    answer: list[int]


def read_questions(examples: Examples, count: int) -> list[Question]:
    """Returns the last span of targets of each of the first `count` examples as its answer.

    The prompt is everything before that span. ``targets[t]`` is the token at t + 1, so a span of
    targets at positions first … last is the tokens first + 1 … last + 1.
    """
    questions = []
    for tokens, targets in zip(examples.tokens[:count], examples.targets[:count], strict=True):
        counted = np.asarray(targets) != IGNORE
        last = int(np.flatnonzero(counted)[-1])
        gaps = np.flatnonzero(~counted[:last])
        first = int(gaps[-1]) + 1 if gaps.size else 0
        prompt = [int(token) for token in tokens[: first + 1]]
        questions.append(Question(prompt, [int(token) for token in targets[first : last + 1]]))
    return questions


def answer_questions(
    setup: Setup, trees: Any, questions: Mapping[str, Sequence[Question]], chat: Chat
) -> list[dict[str, Any]]:
    """Generates answers greedily, in batches of ``evaluation.batch_size`` rows.

    In several processes, all answer the same questions on the mesh in context, and have all rows.

    Questions are sorted by the length of their prompts, so that a batch has little padding, and the
    last batch repeats a question, so that all have the compiled number of rows.

    Args:
      setup: setup of the run.
      trees: base, trainable and constants.
      questions: questions by the name of their set.
      chat: tokenizer and end tokens of the answers.

    Returns:
      The rows of ``samples.jsonl``, in order: ``set`` (if it has a name), ``prompt``, ``expected``,
      ``answer`` and the scores of `rate_answer`.
    """
    flat = [(name, question) for name, some in questions.items() for question in some]
    # One token more than the longest expected answer: anything longer is wrong already.
    longest = max(len(question.answer) for _, question in flat) + 1
    order = sorted(range(len(flat)), key=lambda index: len(flat[index][1].prompt))
    rows, answers = setup.config.evaluation.batch_size, {}
    with track(-(-len(flat) // rows), "answering") as advance:
        for start in range(0, len(order), rows):
            chosen = order[start : start + rows]
            filled = chosen + chosen[-1:] * (rows - len(chosen))
            new = generate_tokens(
                setup.definition,
                trees,
                [flat[index][1].prompt for index in filled],
                setup.options._replace(remat="none"),
                max_new_tokens=longest,
                sampling=Sampling(),
                stop=chat.eos_token_ids,
            )
            answers |= dict(zip(chosen, new, strict=False))  # filler rows come last
            advance()
    return [
        ({"set": name} if name else {}) | _sample(chat, question, answers[index])
        for index, (name, question) in enumerate(flat)
    ]


def _sample(chat: Chat, question: Question, answer: Sequence[int]) -> dict[str, Any]:
    """Returns the row of ``samples.jsonl`` for a generated answer, without ``set``."""

    def text(tokens: Sequence[int]) -> str:
        # Keeps special tokens, which can be the whole answer, and all spaces.
        return chat.tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    right = question.answer
    while right and right[-1] in chat.eos_token_ids:
        right = right[:-1]  # `generate_tokens` omits the end token
    given, expected = text(answer).strip(), text(right).strip()
    shown = {"prompt": text(question.prompt), "expected": expected, "answer": given}
    return shown | rate_answer(given, expected)


def average(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the mean scores over all samples and, prefixed by its name, over each named set."""
    scores = {}
    for name in ("", *dict.fromkeys(sample["set"] for sample in samples if "set" in sample)):
        own = [sample for sample in samples if not name or sample["set"] == name]
        prefix = f"{name}/" if name else ""
        for score in answer_scores():
            scores[f"{prefix}{score}"] = sum(sample[score] for sample in own) / len(own)
    return scores
