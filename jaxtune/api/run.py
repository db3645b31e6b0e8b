"""Training runs: their results and models."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxtune.adapter_files import EXPORTS
from jaxtune.adapter_files.peft import read_adapter, write_adapter
from jaxtune.adapters import StoredAdapter
from jaxtune.adapters.define import define
from jaxtune.adapters.merge import check_merges
from jaxtune.api.evaluate_run import merge_losses
from jaxtune.api.load_run import load_trained, merge_run
from jaxtune.api.loading import ONLY, choose_template, load_with_adapters
from jaxtune.api.meshes import run_mesh
from jaxtune.api.model import Choice, Model
from jaxtune.chats.template import read_template
from jaxtune.checkpoints import huggingface
from jaxtune.checkpoints.chat import Chat
from jaxtune.checkpoints.load_model import LoadedModel, load_model
from jaxtune.checkpoints.merging import Merge
from jaxtune.checkpoints.open_model import OpenModel, files_beside
from jaxtune.checkpoints.requantize import REPORT, read_report, write_report
from jaxtune.data.in_memory import in_memory
from jaxtune.errors import JaxtuneError, check_path, lookup
from jaxtune.parallel.processes import agree, leads, on_leader
from jaxtune.planning.plan import model_config
from jaxtune.runs.base import base_revision, open_base
from jaxtune.runs.chat import load_run_chat
from jaxtune.runs.directory import RunDirectory
from jaxtune.runs.metrics import read_lines
from jaxtune.runs.paths import EXTRA
from jaxtune.strict_json import entry, read_object
from jaxtune.training import train as training

_logger = logging.getLogger(__name__)


class Run:
    """A run on disk: its config, its measurements and the model that it trained."""

    def __init__(self, workdir: str | Path):
        """Opens the run in a directory.

        Raises:
          JaxtuneError: the directory contains no run.
        """
        self.directory = RunDirectory(check_path("workdir", workdir))
        self.config = self.directory.read_config()

    def __repr__(self) -> str:
        planned, done = self.directory.steps_planned(), self.directory.steps_done()
        parts = [
            f"{str(self.path)!r}",
            f"{self.config.adapter.method} on {self.config.model.path}",
            "not started" if planned is None else f"{done} of {planned} steps",
        ]
        losses = [x for line in self.metrics() if isinstance(x := line.get("loss"), float)]
        if losses:
            parts.append(f"loss {losses[-1]:.4f}")
        extra = self.directory.checkpoints / str(done) / EXTRA
        tally = entry(read_object(extra), "tally", dict, extra) if extra.is_file() else {}
        if tally.get("best_step") is not None:
            best, step = entry(tally, "best", float, extra), entry(tally, "best_step", int, extra)
            parts.append(f"best {self.config.evaluation.stop_metric} {best:.4f} after step {step}")
        return f"Run({', '.join(parts)})"

    @property
    def path(self) -> Path:
        """The run's directory."""
        return self.directory.path

    def metrics(self) -> list[dict[str, Any]]:
        """Returns the lines of metrics.jsonl: step, loss, learning_rate, grad_norm, tokens, …"""
        return read_lines(self.directory.metrics)

    def evaluations(self) -> list[dict[str, Any]]:
        """Returns the lines of evaluations.jsonl: step, loss, token_accuracy, tokens."""
        return read_lines(self.directory.evaluations)

    def model(
        self, adapter: str = "best", *, chat_template: str | Path = "", mesh: Mesh | None = None
    ) -> Model:
        """Loads the model that the run trained, with the run's chat template, end tokens and clock.

        Args:
          adapter: "best" (by evaluation.stop_metric; the last one if nothing was held out), "last",
            or "none" for the base model alone.
          chat_template: a Jinja file or the name of a built-in template that replaces the run's.
          mesh: mesh on which the model is placed; by default that of the run, fitted to the
            devices, or one device if it splits no weight.

        With several processes, all of them call this.

        Raises:
          JaxtuneError: nothing has been saved yet.
        """
        lookup(dict.fromkeys(("best", "last", "none")), adapter, "adapter")
        settings = self.config
        mesh = run_mesh(settings, self._base.source.config) if mesh is None else mesh
        chats = self._chats(read_template(chat_template, "chat_template"))
        load = functools.partial(
            load_with_adapters,
            settings.model.path,
            settings.quantize.to_dict(),
            settings.training.dtype,
            revision=base_revision(self.directory, settings),
            mesh=mesh,
            attention=settings.model.attention,
            chats=chats,
        )
        if adapter == "none":
            return load()
        method, _ = training.choose_method(settings.adapter)
        quantized = bool(settings.quantize.format)
        if method.edits_base or (quantized and not method.has_adapter):
            return self._as_trained(adapter, chats, mesh)
        if not method.has_adapter:
            return self._fully_trained(adapter, chats, mesh)
        return load(adapters={ONLY: self.adapter_directory(adapter)}).use(ONLY)

    def save_merged(
        self, directory: str | Path, adapter: str = "best", *, quantized: bool = False
    ) -> Path:
        """Writes the model that the run trained as one Hugging Face checkpoint.

        Weights are read, merged and written one at a time on the host, so that any model can be
        merged without an accelerator. With several processes, all of them call this and process 0
        writes.

        Args:
          directory: directory to create.
          adapter: "best" or "last".
          quantized: writes the weights in the format of the run's base, with ``merge_report.json``
            (see `Model.save_pretrained`). If the run held out rows of files, the report also has
            ``loss``; see `jaxtune.api.evaluate_run.merge_losses`.

        Returns:
          The directory.

        Raises:
          JaxtuneError: nothing has been saved yet, or the adapter cannot be merged.
        """
        check_merges(training.choose_method(self.config.adapter)[0])
        if quantized and not self.config.quantize.format:
            raise JaxtuneError(f"{self.path}: quantize.format is empty: the base is not quantized")
        if self.config.quantize.format and not quantized:
            form, dtype = self.config.quantize.format, self.config.training.dtype
            _logger.info("merging into %s weights; quantized=True would keep %s", dtype, form)
        merge = merge_run(self.directory, self.config, self._base.source, adapter)
        written = Path(directory)
        on_leader(lambda: self._write_merged(written, merge, quantized))
        data = self.config.data
        held_out = (data.eval or data.eval_split) and not in_memory(data)
        # Process 0 decides whether all of them measure: others may not see the file that it wrote.
        if held_out and agree((written / REPORT).is_file()):
            if not (written / REPORT).is_file():
                raise JaxtuneError(
                    f"{written}: written by process 0 but not visible to another process, which "
                    "measures its loss; the directory must be on a file system that all share"
                )
            losses = merge_losses(self.directory, adapter, written)
            if leads():
                write_report(written, read_report(written) | {"loss": losses})
        return written

    def _write_merged(self, directory: Path, merge: Merge, quantized: bool) -> None:
        huggingface.convert(
            directory,
            merge.definition,
            merge.source,
            beside=files_beside(self._base.directory, self._chats("")(None)),
            dtype=self.config.training.dtype,
            edits=merge.edits,
            quantized=quantized,
            original=merge.original,
        )

    def adapter_directory(self, which: str = "best") -> Path:
        """Returns the directory of the best or last adapter, in PEFT's format.

        Raises:
          JaxtuneError: nothing has been saved yet, or the run has no adapter (full fine-tuning).
        """
        return self.directory.adapter(which)

    def adapter(self, which: str = "best", target: str = "peft") -> StoredAdapter:
        """Returns the best or last adapter in the form that another program loads.

        Args:
          which: "best" or "last".
          target: "peft" or "vllm".

        Raises:
          JaxtuneError: nothing has been saved yet, the base's config.json is missing, or the
            program would not load the adapter.
        """
        export = lookup(EXPORTS, target, "target")
        revision = base_revision(self.directory, self.config)
        section = dataclasses.replace(self.config.model, revision=revision)
        definition = define(model_config(section), "float32")
        return export(read_adapter(self.adapter_directory(which), encoder=True), definition)

    def save_adapter(
        self, directory: str | Path, adapter: str = "best", *, target: str = "peft"
    ) -> Path:
        """Writes the adapter for another program, with tokenizer and generation_config.json.

        Args:
          directory: directory to create.
          adapter: "best" or "last".
          target: "peft" or "vllm".

        Returns:
          The directory.

        Raises:
          JaxtuneError: an error of `adapter`, or the directory is not empty.
        """
        stored = self.adapter(adapter, target)
        chats = self._chats("")
        on_leader(lambda: write_adapter(directory, stored, chats(None).files()))
        return Path(directory)

    @functools.cached_property
    def _base(self) -> OpenModel:
        """The checkpoint from which the run started."""
        return open_base(self.directory, self.config)

    def _chats(self, template: str) -> Callable[[Choice], Chat]:
        """Returns a function that gives the run's chat format for every choice of adapters."""

        @functools.cache
        def chat() -> Chat:
            loaded = load_run_chat(self.directory, self.config, self._base.source)
            return choose_template(loaded, template)

        return lambda choice: chat()

    def _as_trained(self, adapter: str, chats: Callable[[Choice], Chat], mesh: Mesh) -> Model:
        source = self._base.source
        return self._model(
            load_trained(self.directory, self.config, source, adapter, mesh), mesh, chats
        )

    def _fully_trained(self, which: str, chats: Callable[[Choice], Chat], mesh: Mesh) -> Model:
        # Trained weights are rounded to the dtype of the run, as in an export, although training
        # keeps them in float32.
        merge = merge_run(self.directory, self.config, self._base.source, which)
        parts = load_model(merge.source, self.config.training.dtype, mesh)
        return self._model(parts, mesh, chats)

    def _model(self, parts: LoadedModel, mesh: Mesh, chats: Callable[[Choice], Chat]) -> Model:
        return Model(
            parts,
            self._base.directory,
            mesh,
            dtype=self.config.training.dtype,
            attention=self.config.model.attention,
            chats=chats,
        )
