"""A model is used through its interface: other packages do not ask for classes of layers."""

import ast
import importlib
from pathlib import Path

import pytest
from flax import nnx

import jaxtune

ROOT = Path(jaxtune.__file__).parent
INSIDE = ("layers", "models")
MODULES = sorted(
    path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in INSIDE
)


def layer_classes(tree: ast.Module) -> set[str]:
    """The names in a module that stand for classes of jaxtune.layers or jaxtune.models."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        if node.module.split(".")[:1] != ["jaxtune"] or node.module.split(".")[1:2] == []:
            continue
        if node.module.split(".")[1] not in INSIDE:
            continue
        module = importlib.import_module(node.module)
        for alias in node.names:
            value = getattr(module, alias.name, None)
            if isinstance(value, type) and issubclass(value, nnx.Module):
                found.add(alias.asname or alias.name)
    return found


def violations(source: str) -> list[str]:
    """What a module does that only layers/ and models/ may do, with its lines."""
    tree = ast.parse(source)
    classes, found = layer_classes(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
            asked = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
            asked |= {n.attr for n in ast.walk(node.args[1]) if isinstance(n, ast.Attribute)}
            found += [f"{node.lineno}: isinstance(…, {name})" for name in asked & classes]
        if not isinstance(node, ast.Attribute):
            continue
        inner = getattr(node.value, "attr", getattr(node.value, "id", ""))
        # `definition.module` is passed on as a whole; `model.decoder` is the name of `model.model`.
        if (inner == "module" and isinstance(node.value, ast.Attribute)) or (
            inner == node.attr == "model"
        ):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_model_is_used_through_its_interface(path):
    assert not violations(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "line",
    [
        "isinstance(attention, MLA)",
        "isinstance(attention, (Attention, MLA))",
        "isinstance(attention, Attention | MLA)",
        "setup.definition.module.model.reserved",
        "definition.module.decoder.reserved",
        "model.model.embed_tokens",
    ],
)
def test_the_check_finds_forbidden_imports(line):
    imports = "from jaxtune.layers.attention import Attention\nfrom jaxtune.layers.mla import MLA\n"
    assert len(violations(imports + line)) >= 1
