"""Reference implementations for the parity tests, and the tolerances of comparisons."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

IGNORE = -100

# Two float32 programs that sum in a different order differ by a few units in the last place (6e-8)
# per operation, over some tens of consecutive operations.
LOGITS = 2e-5
# A loss averages the errors of logits over many tokens.
LOSS = 1e-5


def load_torch(directory: str | Path) -> Any:
    """Loads a checkpoint with transformers, in float32, ready for inference."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Returns the logits float32[B, T, V] of tokens int[B, T]."""
    with torch.no_grad():
        return model(torch.as_tensor(np.asarray(tokens, np.int64))).logits.numpy()


def relative(ours: Any, theirs: Any) -> float:
    """Returns the largest absolute difference, relative to the largest value of `theirs`."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, f"{ours.shape} is not {theirs.shape}"
    assert np.isfinite(ours).all(), "not finite"
    return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))


def assert_same_logits(ours: Any, theirs: Any) -> None:
    """Asserts that logits agree within `LOGITS`."""
    assert relative(ours, theirs) <= LOGITS


def random_tokens(seed: int, *shape: int, vocabulary: int = 160) -> np.ndarray:
    """Returns random int32 tokens of a shape, without the special tokens 0 to 2."""
    return np.random.default_rng(seed).integers(3, vocabulary, shape).astype(np.int32)


class Example(NamedTuple):
    """A row of training data in the format of Hugging Face.

    Attributes:
      input_ids: token ids.
      labels: the same ids where a token is trained on, otherwise `IGNORE`.
    """

    input_ids: list[int]
    labels: list[int]


def make_examples(
    count: int, *, longest: int, shortest: int = 4, seed: int = 0, vocabulary: int = 160
) -> list[Example]:
    """Makes random rows of different lengths, in which a prompt of random length has no labels."""
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        length = int(rng.integers(shortest, longest + 1))
        tokens = rng.integers(3, vocabulary, length).tolist()
        prompt = int(rng.integers(1, length - 1))
        examples.append(Example(tokens, [IGNORE] * prompt + tokens[prompt:]))
    return examples


def summed_loss(model: Any, rows: Sequence[Example]) -> torch.Tensor:
    """Returns the cross-entropy summed over all targets; rows are padded on the right."""
    width = max(len(row.input_ids) for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    labels = torch.full_like(tokens, IGNORE)
    for i, row in enumerate(rows):
        length = len(row.input_ids)
        tokens[i, :length] = torch.tensor(row.input_ids)
        labels[i, :length] = torch.tensor(row.labels)
        mask[i, :length] = 1
    logits = model(tokens, attention_mask=mask).logits[:, :-1]
    return F.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
    )


def target_count(rows: Sequence[Example]) -> int:
    """Returns the number of targets; the first token is never one, because nothing predicts it."""
    return sum(label != IGNORE for row in rows for label in row.labels[1:])


class Recipe(NamedTuple):
    """The settings of a training run with AdamW, for both programs."""

    steps: int = 20
    batch_size: int = 8
    accumulation: int = 4
    learning_rate: float = 5e-3
    warmup_steps: int = 4
    weight_decay: float = 0.1
    clip_norm: float = 0.5


class Update(NamedTuple):
    """The metrics of an optimizer step."""

    loss: float
    learning_rate: float
    grad_norm: float


def train_torch(model: Any, examples: Sequence[Example], recipe: Recipe) -> list[Update]:
    """Trains the parameters that require a gradient; returns the metrics of each step.

    Rows come in order, pass after pass, as from a `torch.utils.data.DataLoader` without shuffling.
    """
    model.train()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    plain = [p for n, p in named if n.endswith("bias") or "norm" in n]
    decayed = [p for n, p in named if not (n.endswith("bias") or "norm" in n)]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, recipe.warmup_steps, recipe.steps)
    updates, size = [], recipe.batch_size // recipe.accumulation
    batches = DataLoader(list(examples), recipe.batch_size, collate_fn=list)
    passes = itertools.chain.from_iterable(itertools.repeat(batches))
    for rows in itertools.islice(passes, recipe.steps):
        targets, total = target_count(rows), 0.0
        for i in range(0, len(rows), size):
            loss = summed_loss(model, rows[i : i + size]) / targets
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in named], recipe.clip_norm)
        updates.append(Update(total, float(schedule.get_last_lr()[0]), float(norm)))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return updates
