"""The loss of every step on the answers of conversations equals that of TRL's SFTTrainer."""

import json

import pytest
import torch
import trl
from oracles import LOSS, Recipe, relative
from test_training import peft_model, run_config

import jaxtune

RECIPE = Recipe(steps=8, batch_size=8, accumulation=4, warmup_steps=2)
# The template of `tiny_chat` with generation tags, which mark the answers and their end tokens.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class InOrder(trl.SFTTrainer):
    """A trainer that keeps the order of the file and records losses before they are rounded."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.micro_losses = []

    def _get_train_sampler(self, *arguments):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def training_step(self, *arguments, **options):
        loss = super().training_step(*arguments, **options)
        self.micro_losses.append(float(loss))
        return loss


def conversations():
    rows = []
    for index in range(40):
        letter = "abcdefgh"[index % 8]
        turns = [{"role": "user", "content": f"{letter}{index}"}]
        turns.append({"role": "assistant", "content": letter * (index % 5 + 1)})
        if index % 3 == 0:
            turns += [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        rows.append({"messages": turns})
    return rows


@pytest.mark.slow
def test_answers_of_conversations_train_as_in_trl(tiny_chat, tmp_path):
    from datasets import Dataset
    from transformers import AutoTokenizer

    rows = conversations()
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat)
    plain = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    tokenizer.chat_template = TEMPLATE
    same = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    assert same == plain
    tokenizer.pad_token = tokenizer.eos_token
    trainer = InOrder(
        peft_model(tiny_chat, tmp_path / "start", target_modules="all-linear"),
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "trl"),
            assistant_only_loss=True,
            max_length=128,
            max_steps=RECIPE.steps,
            per_device_train_batch_size=RECIPE.batch_size // RECIPE.accumulation,
            gradient_accumulation_steps=RECIPE.accumulation,
            learning_rate=RECIPE.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=RECIPE.warmup_steps,
            weight_decay=RECIPE.weight_decay,
            max_grad_norm=RECIPE.clip_norm,
            optim="adamw_torch",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    size = RECIPE.accumulation
    micro = trainer.micro_losses
    theirs = [sum(micro[i : i + size]) for i in range(0, len(micro), size)]

    sections = {"adapter": {"init_from": str(tmp_path / "start")}, "data": {"max_length": 128}}
    run = jaxtune.train(run_config(tiny_chat, file, RECIPE, **sections), tmp_path / "run")
    ours = [line["loss"] for line in run.metrics()]
    assert len(ours) == len(theirs) == RECIPE.steps
    assert abs(theirs[-1] - theirs[0]) > 100 * LOSS * theirs[0]
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True), start=1):
        assert relative(mine, other) <= LOSS, step
