"""The Python interface: loading, running, saving and training models."""

from jaxtune.api.loading import convert, load
from jaxtune.api.model import Model
from jaxtune.api.run import Run
from jaxtune.api.train import train
from jaxtune.generation.sampling import Sampling

__all__ = ["Model", "Run", "Sampling", "convert", "load", "train"]
