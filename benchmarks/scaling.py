"""Compiles large runs ahead of time, without the accelerators, and writes docs/scaling.md.

  python benchmarks/scaling.py                        # all cases: an hour or more on two cores
  python benchmarks/scaling.py --only v3-v6e-256      # one case; other results are kept
  python benchmarks/scaling.py --only none            # rewrites the page and its plot only

Requires the extras tpu-plan, gpu-plan and scaling. Each case is compiled in a separate process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
MODELS = ROOT / "tests" / "models" / "configs"
GIB = 2**30

LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
LORA = {"rank": 8}
INT4, NF4 = {"format": "int4"}, {"format": "nf4"}


def case(model: str, chips: str, rows: int, mesh: dict[str, int], **sections: Any) -> Any:
    """Returns a case: model, topology and config.

    Args:
      model: name of a config in ``tests/models/configs``.
      chips: topology to compile for.
      rows: ``training.batch_size``.
      mesh: devices along each axis of the mesh.
      sections: further sections of the config.
    """
    sections = {"adapter": LORA, "data": {"max_length": 1024}} | sections
    training = {"batch_size": rows, "accumulation": 1, "remat": "full"} | sections.pop(
        "training", {}
    )
    mesh = {"data": 1, **mesh}
    return model, chips, {**sections, "training": training, "mesh": mesh}


V3 = {"adapter": LORA | {"targets": LATENT}, "quantize": INT4}
CHECKS = {
    "v3-v5p-512": case("deepseek-v3", "v5p:8x8x8", 512, {"fsdp": 64, "expert": 8}, **V3),
    "v3-v6e-256": case("deepseek-v3", "v6e:16x16", 256, {"fsdp": 16, "expert": 16}, **V3),
    "v2-lite-v5e-16": case(
        "deepseek-v2-lite",
        "v5e:4x4",
        16,
        {"fsdp": 4, "expert": 4},
        adapter=LORA | {"targets": "all-linear"},
    ),
    "67b-v5p-8": case("deepseek-llm-67b", "v5p:2x2x2", 8, {"fsdp": 8}),
    "7b-v5e-1": case("deepseek-llm-7b", "v5e:1x1", 4, {}),
    "7b-nf4-v5e-1": case("deepseek-llm-7b", "v5e:1x1", 1, {}, quantize=NF4),
    "7b-v5e-16": case("deepseek-llm-7b", "v5e:4x4", 64, {"fsdp": 16}),
    "7b-nf4-v5e-16": case("deepseek-llm-7b", "v5e:4x4", 64, {"fsdp": 16}, quantize=NF4),
    "7b-v6e-256": case("deepseek-llm-7b", "v6e:16x16", 256, {"fsdp": 256}),
    "7b-nf4-v6e-256": case("deepseek-llm-7b", "v6e:16x16", 256, {"fsdp": 256}, quantize=NF4),
    "7b-h100-8": case("deepseek-llm-7b", "h100:8", 32, {"fsdp": 8}),
    "7b-nf4-h100-8": case("deepseek-llm-7b", "h100:8", 32, {"fsdp": 8}, quantize=NF4),
}
# For GPUs only, because compiling for them takes a tenth of the time of compiling for TPUs.
SIZES = (16, 32, 64, 128, 256, 512)
SCALING = {
    f"7b-scaling-{chips}": case(
        "deepseek-llm-7b",
        f"h100:{chips}",
        chips,
        {"fsdp": chips},
        data={"max_length": 4096},
    )
    for chips in SIZES
}
CASES = CHECKS | SCALING


def compile_case(name: str) -> dict[str, Any]:
    """Compiles one case and returns its figures."""
    from jaxtune.config import resolve
    from jaxtune.planning import plan

    model, chips, sections = CASES[name]
    with tempfile.TemporaryDirectory() as directory:
        config = (MODELS / f"{model}.json").read_text(encoding="utf-8")
        (Path(directory) / "config.json").write_text(config, encoding="utf-8")
        result = plan(resolve({"model": {"path": directory}, **sections}), chips)
    gathered: dict[str, float] = {}
    for each in result.sent or []:
        if each.kind == "all-gather":
            gathered[each.dtype] = gathered.get(each.dtype, 0) + each.times * each.sent
    flops = result.flops.hardware / result.devices
    return json.loads(result.to_json()) | {"gathered": gathered, "flops_per_device": flops}


def run(name: str) -> dict[str, Any]:
    """Compiles one case in a separate process."""
    print(f"{name} …", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, __file__, "--case", name],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def check_rows(results: dict[str, Any]) -> list[str]:
    """Returns the lines of the table of runs."""
    lines = [
        "| run | chips | mesh | weights etc. | at the peak | of | fits | gathered as "
        "| compiled in |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in CHECKS:
        if name not in results:
            continue
        r, (model, chips, sections) = results[name], CASES[name]
        sizes = r["per_device_bytes"]
        how = sections.get("quantize", {}).get("format", "bfloat16")
        mesh = ", ".join(f"{axis} {n}" for axis, n in r["mesh"].items() if n > 1) or "–"
        gathered = sorted(r["gathered"].items(), key=lambda item: -item[1])
        total = sum(r["gathered"].values()) or 1
        kinds = ", ".join(f"{kind} {size / total:.0%}" for kind, size in gathered[:2]) or "–"
        lines.append(
            f"| {model}, LoRA over {how} | {chips} | {mesh} | {sizes['arguments'] / GIB:.2f} | "
            f"{sizes['total'] / GIB:.2f} | {r['capacity_bytes'] / GIB:.2f} | "
            f"{'yes' if r['fits'] else 'no'} | {kinds} | {r['compile_seconds']:.0f} s |"
        )
    return lines


def scaling_rows(results: dict[str, Any]) -> list[str]:
    """Returns the lines of the table of numbers of chips."""
    lines = [
        "| chips | GiB at the peak | TFLOP per chip | GiB sent per chip | all-gather | "
        "reduce-scatter | all-reduce | compiled in |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for chips in SIZES:
        r = results.get(f"7b-scaling-{chips}")
        if r is None or r["collectives"] is None:
            continue
        sent = {kind: row["bytes"] / GIB for kind, row in r["collectives"].items()}
        kinds = ("all-gather", "reduce-scatter", "all-reduce")
        each = " | ".join(f"{sent.get(kind, 0):.2f}" for kind in kinds)
        lines.append(
            f"| {chips} | {r['per_device_bytes']['total'] / GIB:.2f} | "
            f"{r['flops_per_device'] / 1e12:.1f} | {sum(sent.values()):.2f} | {each} | "
            f"{r['compile_seconds']:.0f} s |"
        )
    return lines


def picture(results: dict[str, Any], path: Path) -> None:
    """Plots operations and bytes sent per chip against the number of chips."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = [(n, results[f"7b-scaling-{n}"]) for n in SIZES if f"7b-scaling-{n}" in results]
    found = [(n, r) for n, r in found if r["collectives"] is not None]
    chips = [n for n, _ in found]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    left.plot(chips, [r["flops_per_device"] / 1e12 for _, r in found], "o-")
    left.set(title="operations per chip", ylabel="TFLOP per step")
    sent = [sum(row["bytes"] for row in r["collectives"].values()) / GIB for _, r in found]
    right.plot(chips, sent, "o-")
    right.set(title="bytes sent per chip", ylabel="GiB per step")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(chips, [str(n) for n in chips])
        axes.set_xlabel("H100s")
        axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write_page(results: dict[str, Any]) -> None:
    """Updates docs/scaling.md between its markers, and the picture."""
    page = DOCS / "scaling.md"
    text = page.read_text(encoding="utf-8")
    for mark, lines in (("runs", check_rows(results)), ("slices", scaling_rows(results))):
        begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
        before, rest = text.split(begin)
        text = before + "\n".join([begin, *lines, end]) + rest.split(end)[1]
    page.write_text(text, encoding="utf-8")
    picture(results, DOCS / "scaling.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="CASE", help=f"cases: {', '.join(CASES)}")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(compile_case(arguments.case)))
        return
    kept = DOCS / "scaling.json"
    results = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    for name in arguments.only or CASES:
        if name != "none":
            results[name] = run(name)
            kept.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write_page(results)


if __name__ == "__main__":
    main()
