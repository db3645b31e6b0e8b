"""Generated answers to held-out prompts during a run, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune.checkpoints.chat import Chat
from jaxtune.data import Examples
from jaxtune.generation.generate import Sampling, generate_tokens
from jaxtune.objectives.cross_entropy import IGNORE
from jaxtune.progress import track
from jaxtune.training.setup import Setup

ANSWER_SCORES: dict[str, Callable[[str, str], float]] = {
    "exact_match": lambda answer, expected: float(answer == expected),
}
"""Scores of an answer by name: ``(answer, expected) -> [0, 1]``, averaged over a set."""


class Question(NamedTuple):
    """A held-out prompt and its expected answer, as token ids."""

    prompt: list[int]
    answer: list[int]


def read_questions(examples: Examples, count: int) -> list[Question]:
    """Splits the first `count` examples into their last span of targets and the text before it."""
    questions = []
    for tokens, targets in zip(examples.tokens[:count], examples.targets[:count], strict=True):
        counted = np.asarray(targets) != IGNORE
        last = int(np.flatnonzero(counted)[-1])
        gaps = np.flatnonzero(~counted[:last])
        first = int(gaps[-1]) + 1 if gaps.size else 0
        # The target at a position is the token after it.
        prompt = [int(token) for token in tokens[: first + 1]]
        questions.append(Question(prompt, [int(token) for token in targets[first : last + 1]]))
    return questions


def answer_questions(
    setup: Setup, trees: Any, questions: Mapping[str, Sequence[Question]], chat: Chat
) -> list[dict[str, Any]]:
    """Generates answers greedily, in batches of ``evaluation.batch_size`` rows.

    Args:
      setup: setup of the run.
      trees: base, trainable and constants.
      questions: questions by the name of their set.
      chat: tokenizer and end tokens of the answers.

    Returns:
      The rows of ``samples.jsonl``, in order: ``set`` (if it has a name), ``prompt``, ``expected``,
      ``answer`` and `ANSWER_SCORES`.
    """
    flat = [(name, question) for name, some in questions.items() for question in some]
    # A longer answer than the longest expected one is wrong in any case.
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
    def text(tokens: Sequence[int]) -> str:
        # With special tokens, which can be the whole answer, and without the clean-up of spaces,
        # which would change it.
        return chat.tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    right = question.answer
    while right and right[-1] in chat.eos_token_ids:
        right = right[:-1]  # `generate_tokens` omits the end token
    given, expected = text(answer).strip(), text(right).strip()
    shown = {"prompt": text(question.prompt), "expected": expected, "answer": given}
    return shown | {score: rate(given, expected) for score, rate in ANSWER_SCORES.items()}


def average(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Averages the scores of samples over all sets and over each named set."""
    scores = {}
    for name in ("", *dict.fromkeys(sample["set"] for sample in samples if "set" in sample)):
        own = [sample for sample in samples if not name or sample["set"] == name]
        prefix = f"{name}/" if name else ""
        for score in ANSWER_SCORES:
            scores[f"{prefix}{score}"] = sum(sample[score] for sample in own) / len(own)
    return scores
