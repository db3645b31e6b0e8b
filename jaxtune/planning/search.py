"""Search for the fastest mesh, remat policy and micro-batch size of a config."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from jaxtune.config import Config
from jaxtune.errors import JaxtuneError
from jaxtune.parallel.devices import GIB, TPUS
from jaxtune.parallel.rules import MESH_AXES, RULES
from jaxtune.planning.arguments import by_kind, step_arguments
from jaxtune.planning.flops import StepFlops, step_flops
from jaxtune.planning.plan import Plan, compile_plan, model_config
from jaxtune.planning.roofline import estimate
from jaxtune.planning.topology import Topology, find_topology
from jaxtune.planning.traffic import estimated_collectives
from jaxtune.progress import track
from jaxtune.registry import REMAT_POLICIES
from jaxtune.training.placement.memory import bytes_per_device
from jaxtune.training.setup import Setup, set_up
from jaxtune.training.train import choose_method

logger = logging.getLogger(__name__)

_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Settings that change neither the result nor the batch.

    Attributes:
      mesh: (axis, devices) pairs; other axes have one device.
      remat: rematerialisation policy.
      accumulation: micro-batches per step.
    """

    mesh: tuple[tuple[str, int], ...]
    remat: str
    accumulation: int

    def apply(self, config: Config) -> Config:
        """Returns the config with these settings; the sizes of the mesh are used or refused."""
        chosen = config.replace(
            mesh=dict.fromkeys(MESH_AXES, 1) | dict(self.mesh),
            training={"remat": self.remat, "accumulation": self.accumulation},
        )
        fixed = {f"mesh.{axis}" for axis in MESH_AXES}
        return dataclasses.replace(chosen, overridden=config.overridden | fixed)

    def lines(self) -> list[str]:
        """Returns the lines of a config file with these settings."""
        mesh = dict.fromkeys(MESH_AXES, 1) | dict(self.mesh)
        return [
            *(f"c.mesh.{axis} = {size}" for axis, size in mesh.items()),
            f'c.training.remat = "{self.remat}"',
            f"c.training.accumulation = {self.accumulation}",
        ]


@dataclasses.dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
      topology: name of the hardware.
      ranked: candidates that fit, the fastest first.
      tried: number of candidates that were compiled.
      left: number of candidates that were not.
      nearest: the smallest plan that does not fit; None if all fit.
    """

    topology: str
    ranked: list[tuple[Candidate, Plan]]
    tried: int
    left: int
    nearest: Plan | None

    def to_json(self) -> str:
        """Returns the result as JSON, the fastest candidate first."""
        rows = [{"config": candidate.lines(), **plan.to_dict()} for candidate, plan in self.ranked]
        content = {"tried": self.tried, "left": self.left, "ranked": rows}
        return json.dumps(content, indent=2) + "\n"

    def render(self) -> str:
        """Returns the best candidates as text, with lines to paste into a config."""
        head = f"{self.tried} tried for {self.topology}, {len(self.ranked)} fit"
        lines = [head + (f"; {self.left} left untried" if self.left else "")]
        if not self.ranked and self.nearest is not None:
            short = (self.nearest.total - self.nearest.capacity) / GIB
            lines.append(f"nothing fits: {short:.2f} GiB are missing at least")
        for place, (candidate, plan) in enumerate(self.ranked[:_SHOWN], 1):
            speed = "" if plan.time is None else f"{plan.time.tokens_per_second:,.0f} tokens/s, "
            mesh = " × ".join(f"{axis} {size}" for axis, size in candidate.mesh) or "one device"
            lines.append(
                f"{place}. {speed}{plan.total / GIB:.2f} of {plan.capacity / GIB:.2f} GiB: {mesh}, "
                f"remat {candidate.remat}, {candidate.accumulation} micro-batch(es)"
            )
        if self.ranked:
            lines += ["", "for the config file:", *(f"    {x}" for x in self.ranked[0][0].lines())]
        return "\n".join(lines) + "\n"


def search(config: Config, topology: str, tries: int) -> Found:
    """Compiles the most promising candidates for a config, and ranks those that fit.

    Candidates differ in the mesh, `training.remat` and `training.accumulation` and so compute the
    same result from the same batch. Formulas decide the order in which they are compiled; the
    compiler decides which ones fit.

    Args:
      config: a resolved config.
      topology: name of the hardware; see `jaxtune.planning.topology.find_topology`.
      tries: maximum number of candidates to compile.

    Raises:
      JaxtuneError: `tries` is not positive, or no compiler for the hardware.
    """
    if tries < 1:
        raise JaxtuneError(f"--tries is at least 1, not {tries}")
    hardware, model = find_topology(topology), model_config(config.model)
    if hardware.devices is None:
        raise JaxtuneError(f"--search needs a compiler: {hardware.note}")
    rows = config.training.batch_size
    everything = list(candidates(rows, model, hardware.count))
    if not everything:  # fewer rows than devices
        everything = list(candidates(rows, model, hardware.count, padded=True))
    single_device = functools.cache(functools.partial(_on_one_device, config, model))
    everything.sort(
        key=lambda one: promise(one, single_device(one.remat, one.accumulation), hardware)
    )
    return _try(config, model, everything, hardware, tries)


def _on_one_device(
    config: Config, model: Mapping[str, Any], remat: str, accumulation: int
) -> tuple[Setup, StepFlops]:
    """Sets up a candidate on one device, which is enough for formulas."""
    chosen = Candidate((), remat, accumulation).apply(config)
    setup = set_up(chosen, model, choose_method(chosen.adapter)[0], jax.devices("cpu")[:1])
    return setup, step_flops(setup)


def promise(
    candidate: Candidate, alone: tuple[Setup, StepFlops], hardware: Topology
) -> tuple[bool, float]:
    """Returns the sort key of a candidate: whether it is likely too large, then its time."""
    setup, flops = alone
    mesh = dict.fromkeys(MESH_AXES, 1) | dict(candidate.mesh)
    trees = by_kind(step_arguments(setup))
    needs = sum(bytes_per_device(tree, mesh) for tree in trees.values())
    needs += setup.temporaries(mesh)
    sent = sum(each.times * each.sent for each in estimated_collectives(setup, mesh))
    chip = hardware.chip or TPUS["v5e"]  # any chip will do for a CPU: only the order matters
    return needs > 1.25 * hardware.capacity_bytes, estimate(chip, flops, mesh, sent).seconds


def _try(
    config: Config, model: Mapping[str, Any], order: list[Candidate], hardware: Topology, tries: int
) -> Found:
    ranked: list[tuple[Candidate, Plan]] = []
    misfits: list[tuple[Candidate, Plan]] = []
    left = len(order)
    with track(min(tries, len(order)), "compiling") as advance:
        for candidate in order:
            if len(ranked) + len(misfits) == tries:
                break
            left -= 1
            # A candidate that needs more memory than one that did not fit is not worth compiling.
            if any(_needs_more(candidate, other) for other, _ in misfits):
                continue
            chosen = candidate.apply(config)
            try:
                method, _ = choose_method(chosen.adapter)
                setup = set_up(chosen, model, method, hardware.group)
            except JaxtuneError as error:
                # Sizes that the model cannot use, such as 4 for mesh.expert with 6 experts.
                logger.info("%s: %s", candidate, error)
                continue
            result = compile_plan(setup, hardware)
            (ranked if result.fits else misfits).append((candidate, result))
            advance()
    ranked.sort(key=lambda pair: pair[1].time.seconds if pair[1].time else pair[1].total)
    nearest = min((plan for _, plan in misfits), key=lambda plan: plan.total, default=None)
    return Found(hardware.name, ranked, len(ranked) + len(misfits), left, nearest)


def _needs_more(candidate: Candidate, misfit: Candidate) -> bool:
    """Returns whether a candidate needs at least the memory of one that did not fit."""
    order = list(REMAT_POLICIES)
    return (
        candidate.mesh == misfit.mesh
        and candidate.accumulation <= misfit.accumulation
        and order.index(candidate.remat) >= order.index(misfit.remat)
    )


def candidates(
    batch: int, model: Mapping[str, Any], devices: int, *, padded: bool = False
) -> Iterator[Candidate]:
    """Yields all candidates, including some that the model cannot be set up with.

    Args:
      batch: rows per optimizer step.
      model: content of the model's config.json.
      devices: number of devices.
      padded: whether each device gets one row, which is empty on some, instead of equal numbers.
    """
    mixture = any(model.get(key) for key in ("n_routed_experts", "num_experts"))
    powers = [2**n for n in range(devices.bit_length()) if devices % 2**n == 0]
    for tensor, expert, fsdp in itertools.product(powers, powers, powers):
        rest, remainder = divmod(devices, tensor * expert * fsdp)
        if remainder or (expert > 1 and not mixture) or tensor > 8:
            continue
        sizes = {"data": rest, "fsdp": fsdp, "tensor": tensor, "expert": expert}
        mesh = tuple((axis, size) for axis, size in sizes.items() if size > 1)
        shares = math.prod(sizes[axis] for axis in RULES["batch"])
        counts = [n for n in range(1, batch + 1) if batch % (n * shares) == 0]
        for accumulation in [1] if padded else counts:
            if accumulation & (accumulation - 1) == 0:
                for remat in REMAT_POLICIES:
                    yield Candidate(mesh, remat, accumulation)
