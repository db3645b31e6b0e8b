"""A package imports only from those above it in the order of the architecture."""

import ast
from pathlib import Path

import pytest

import jaxtune

ORDER = (
    "memory_errors",
    "errors",
    "vocabulary",
    "progress",
    "log_output",
    "strict_json",
    "compatibility",
    "intervals",
    "atomic_files",
    "hub",
    "environment",
    "registry",
    "config",
    "parallel",
    "quant",
    "layers",
    "models",
    "adapters",
    "checkpoints",
    "adapter_files",
    "chats",
    "data",
    "runs",
    "objectives",
    "generation",
    "training",
    "planning",
    "api",
    "demos",
    "commands",
    "cli",
    "__main__",
)
ROOT = Path(jaxtune.__file__).parent
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def _rung(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def _imported(path: Path) -> set[str]:
    """Returns the packages of jaxtune that a module imports, inside functions as well."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "jaxtune":
                # `import jaxtune` and its public names stand for the Python interface.
                package = parts[1] if len(parts) > 1 else "api"
                found.add(package if package in ORDER else "api")
    return found


def test_every_package_is_in_the_table():
    assert {_rung(path) for path in MODULES} == set(ORDER)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_from_above(path):
    own = ORDER.index(_rung(path))
    below = {name for name in _imported(path) if ORDER.index(name) > own}
    assert not below, f"{_rung(path)} may not import from {below}"


def test_json_is_read_by_one_module():
    # Others would accept NaN and duplicate keys, and raise other errors for damaged files.
    readers = {
        str(path.relative_to(ROOT))
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr in ("load", "loads", "JSONDecoder")
        and isinstance(node.value, ast.Name)
        and node.value.id == "json"
    }
    # The process that renders templates imports nothing of jaxtune, and reads what jaxtune sends.
    assert readers == {"strict_json.py", "chats/template_worker.py"}
