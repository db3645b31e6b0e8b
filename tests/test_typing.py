"""Config and settings are passed in types of their own."""

import ast
from pathlib import Path

import pytest

import jaxtune
from jaxtune.config import OPTIONS

ROOT = Path(jaxtune.__file__).parent
SECTIONS = {key.partition(".")[0] for key in OPTIONS}
CARRIERS = {"config", "section", "sections", "settings", "setting", "options", "changes"}
# These read JSON of other programs, whose values have any type (config.json, adapter_config.json),
# and pass arguments on to jax. The names of sections have other meanings there.
FOREIGN = ("adapter_files", "adapters", "checkpoints", "layers", "models", "parallel", "planning")
CONFIG_JSON = "model_config"  # what the content of a config.json is called elsewhere
UNTYPED_MAPPINGS = {"dict[str, Any]", "Mapping[str, Any]"}


def untyped(source, name="", *, foreign=False):
    """Yields the parameters and attributes that carry config without a type."""
    for node in ast.walk(ast.parse(source)):
        pairs = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            a = node.args
            pairs = [(p.arg, p.annotation) for p in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
            if a.kwarg and not foreign:
                pairs.append((a.kwarg.arg, a.kwarg.annotation))
            if node.name.strip("_").rpartition("_")[2] in CARRIERS:
                pairs.append((node.name, node.returns))
        elif isinstance(node, ast.AnnAssign):
            target = node.target
            pairs = [(getattr(target, "id", getattr(target, "attr", "")), node.annotation)]
        for carrier, annotation in pairs:
            words = carrier.strip("_")
            section = words in SECTIONS and not foreign
            if not section and words.rpartition("_")[2] not in CARRIERS:
                continue
            text = "" if annotation is None else ast.unparse(annotation)
            bare = "Any" in text.split(" | ")
            ours = not foreign and words != CONFIG_JSON
            if bare or (ours and text in UNTYPED_MAPPINGS):
                yield f"{name}:{node.lineno}: {carrier}: {text}"


@pytest.mark.parametrize(
    "source",
    [
        "def f(config: Any): ...",
        "def f(*, training: Any | None = None): ...",
        "def f(**options: Any): ...",
        "def _order_settings(config: Config) -> dict[str, Any]: ...",
        "class A:\n    data_settings: Any",
        "def f():\n    self._options: dict[str, Any] = {}",
    ],
)
def test_untyped_config_is_found(source):
    assert len([*untyped(source)]) == 1


def test_typed_config_is_passed_over():
    typed = "def f(config: Config, data: DataConfig | None, **options: Unpack[ReaderOptions]): ..."
    assert not [*untyped(typed)] and not [*untyped("def f(rows: Any, content: Any): ...")]


def test_config_has_types():
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        place = path.relative_to(ROOT)
        foreign = place.parts[0] in FOREIGN
        found += untyped(path.read_text(encoding="utf-8"), place, foreign=foreign)
    assert not found
