"""jaxtune: fine-tune DeepSeek models with JAX on TPUs, GPUs and plain CPUs."""

from jaxtune.api import Model, Run, load, train
from jaxtune.errors import JaxtuneError

__all__ = ["JaxtuneError", "Model", "Run", "load", "train"]
