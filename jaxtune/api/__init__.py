"""The Python interface: load a model, look at it, generate with it, save it, train one."""

from jaxtune.api.loading import convert, load
from jaxtune.api.model import Model
from jaxtune.api.run import Run, train
from jaxtune.generation.generate import Sampling

__all__ = ["Model", "Run", "Sampling", "convert", "load", "train"]
