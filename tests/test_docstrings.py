"""Every public name has a docstring, and those with arrays give shapes."""

import importlib
import inspect
import pkgutil
import re

import pytest

import jaxtune

ARRAY = re.compile(r"\b(jax\.Array|jnp\.ndarray|np\.ndarray|ArrayLike)\b")
# [B, T], float32[out, in], [L, …]; "scalar"; or where the shape is given, as for a file's tensors.
SHAPE = re.compile(r"\[[\w /·×,.…+\-*]+\]|\bscalars?\b|\bshapes?\b")
MODULES = [info.name for info in pkgutil.walk_packages(jaxtune.__path__, prefix="jaxtune.")]


def _public(scope, module):
    """Yields (name, object) of the public functions and classes that a module or class defines."""
    for name, value in vars(scope).items():
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        value = getattr(value, "fget", None) or getattr(value, "func", None) or value
        value = inspect.unwrap(value) if callable(value) else value
        if name.startswith("_") or not (inspect.isfunction(value) or inspect.isclass(value)):
            continue
        if value.__module__ == module:
            yield f"{scope.__name__}.{name}", value


def _names(module):
    loaded = importlib.import_module(module)
    for name, value in _public(loaded, module):
        yield name, value
        if inspect.isclass(value):
            yield from _public(value, module)


def _annotations(value):
    return " ".join(str(annotation) for annotation in inspect.get_annotations(value).values())


@pytest.mark.parametrize("module", MODULES)
def test_public_names_have_docstrings(module):
    assert importlib.import_module(module).__doc__, module
    assert not [name for name, value in _names(module) if not (value.__doc__ or "").strip()]


@pytest.mark.parametrize("module", MODULES)
def test_arrays_have_shapes(module):
    silent = [
        name
        for name, value in _names(module)
        if ARRAY.search(_annotations(value)) and not SHAPE.search(value.__doc__ or "")
    ]
    assert not silent
