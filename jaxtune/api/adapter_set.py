"""Named adapters of one base, each attached once and combined on demand."""

from __future__ import annotations

import numbers
from collections.abc import Mapping

from jax.typing import DTypeLike

from jaxtune.adapter_files.combine import Options, combine
from jaxtune.adapters import StoredAdapter
from jaxtune.checkpoints.load_model import LoadedModel, attach_adapter
from jaxtune.checkpoints.source import TensorSource
from jaxtune.errors import JaxtuneError, check_argument, lookup, shown
from jaxtune.quant import Quantization


class AdapterSet:
    """A base model and its adapters by name, all in memory."""

    def __init__(
        self,
        bare: LoadedModel,
        source: TensorSource,
        dtype: DTypeLike,
        stored: Mapping[str, StoredAdapter],
        quantization: Quantization | None = None,
    ):
        """Attaches every adapter.

        Args:
          bare: the model without a method.
          source: the checkpoint from which it was loaded.
          dtype: dtype of frozen weights.
          stored: adapters by name.
          quantization: weight format of frozen weights, if any.

        Raises:
          JaxtuneError: an adapter does not fit the model.
        """
        self.bare, self.stored = bare, dict(stored)
        self._source, self._dtype, self._quantization = source, dtype, quantization
        self._attached = {name: self._attach(one) for name, one in self.stored.items()}

    def _attach(self, stored: StoredAdapter) -> LoadedModel:
        return attach_adapter(self.bare, self._source, self._dtype, stored, self._quantization)

    def select(
        self, choice: str | Mapping[str, float] | None, method: str, options: Options | None
    ) -> LoadedModel:
        """Returns the model with one adapter, with several combined, or with none.

        Args:
          choice: a name, weights by name, or None for the bare model.
          method: method of combination; see `jaxtune.adapter_files.combine`.
          options: options of the combination.

        Raises:
          JaxtuneError: an unknown name or method, or adapters that cannot be combined.
        """
        if choice is None:
            return self.bare
        if isinstance(choice, str):
            return lookup(self._attached, choice, "adapter")
        return self._attach(combine(self.stored, choice, method, options))


def check_choice(adapter: str | Mapping[str, float] | None) -> None:
    """Raises if the adapters in use are neither a name, nor finite weights by name, nor None."""
    if isinstance(adapter, Mapping):
        for name, weight in adapter.items():
            check_argument(f"weight of {name!r}", weight, numbers.Real, "a number")
            if not abs(weight) < 3e38:  # NaN as well
                raise JaxtuneError(f"weight of {name!r} is {shown(weight)}, not finite")
    elif adapter is not None:
        check_argument("adapter", adapter, str, "a name, weights by name or None")
