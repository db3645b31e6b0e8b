"""The Python interface: load a model, look at it, generate with it, save it, train one."""

from jaxtune.api.loading import convert, load
from jaxtune.api.model import Model
from jaxtune.api.run import Run, train

__all__ = ["Model", "Run", "convert", "load", "train"]
