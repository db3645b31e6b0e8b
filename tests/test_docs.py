"""The documentation: its examples run, and the names in it exist."""

import ast
import math
import re
from pathlib import Path

import pytest

from jaxtune.config import default
from jaxtune.layers.tree import flatten
from jaxtune.training import scores

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "configs/**/*.md")
    for page in ROOT.glob(pattern)
    if page.name != "CHANGELOG.md"
)
# Whose paths in backticks are checked; other pages name files of checkpoints and runs as well.
PAGES_OF_CODE = ["architecture.md", "adding-an-architecture.md", "glossary.md"]
PAGES_OF_CODE += [f"decisions/{page.name}" for page in sorted((DOCS / "decisions").glob("*.md"))]
FOLDERS = (ROOT, ROOT / "jaxtune", ROOT / "jaxtune" / "layers" / "experts", DOCS)
# Of a config; `model.` begins names of weights as well.
SECTIONS = ("adapter", "checkpoint", "data", "evaluation", "logging", "mesh", "optimizer")
SECTIONS += ("profile", "quantize", "training")
PLACEHOLDERS = ("NAME", "*", "…", "<", "{")
CODE = re.compile(r"`([^`\n]+)`")


def name(page):
    return str(page.relative_to(ROOT))


def without_code_blocks(page):
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page):
    """Returns the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", without_code_blocks(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def expanded(path):
    """Returns the paths that `a/{b,c}.py` stands for."""
    if not (braces := re.search(r"\{([\w.,]+)\}", path)):
        return [path]
    return [path.replace(braces[0], each) for each in braces[1].split(",")]


def paths(text):
    """Returns what a text in backticks names as a file or a folder of this project."""
    found = []
    for code in CODE.findall(text):
        words = code.split() if code.startswith(("pytest", "python")) else [code.split(":")[0]]
        for word in words:
            for path in expanded(word):
                if any(mark in path for mark in PLACEHOLDERS):
                    continue
                if re.fullmatch(r"[\w./-]+\.(py|md|json|txt|jinja|yaml)|[\w-]+(/[\w.-]+)*/", path):
                    found.append(path)
    return found


def exists(path):
    if "/" not in path.rstrip("/"):
        # A bare file name, of a file that the text around it places.
        trees = (ROOT / "jaxtune", ROOT / "tests")
        return (ROOT / path).exists() or any(next(t.rglob(path), None) for t in trees)
    return any((folder / path).exists() for folder in FOLDERS)


@pytest.mark.parametrize("page", PAGES_OF_CODE)
def test_files_that_a_page_names_exist(page):
    text = without_code_blocks(DOCS / page)
    # What a run or a checkpoint holds, not this repository.
    theirs = {"config.json", "chat.json", "merge_report.json", "adapter_config.json"}
    missing = [path for path in paths(text) if path not in theirs and not exists(path)]
    assert not missing


def test_the_tests_of_promises_exist():
    text = (DOCS / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    rows = [int(number) for number in re.findall(r"^\| (\d+) \|.*::", text, re.M)]
    assert rows == [*range(1, 21)]
    for path, function in named:
        tree = ast.parse((ROOT / "tests" / path).read_text(encoding="utf-8"))
        functions = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        assert function in functions, (path, function)


def test_the_registries_in_the_table_exist():
    rows = [line for line in (DOCS / "architecture.md").read_text().splitlines() if " in `" in line]
    found = [
        (registry, path)
        for row in rows
        for registries, path in re.findall(r"((?:`[A-Z_]+`(?:, | and )?)+) in `([\w/]+\.py)`", row)
        for registry in CODE.findall(registries)
    ]
    assert len(found) >= 15
    for registry, path in found:
        tree = ast.parse((ROOT / "jaxtune" / path).read_text(encoding="utf-8"))
        targets = [t for n in tree.body if isinstance(n, ast.Assign) for t in n.targets]
        targets += [n.target for n in tree.body if isinstance(n, ast.AnnAssign)]
        assert registry in [ast.unparse(target) for target in targets], (registry, path)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_have_targets(page):
    text = without_code_blocks(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_config_keys_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    key = re.compile(rf"(?:^|[\s.`(])(({'|'.join(SECTIONS)})\.([a-z]\w*))(?=$|[\s=`,)])")
    for code in [*CODE.findall(text), *re.findall(r"--config\.\S+", text)]:
        for whole, section, own in key.findall(code):
            assert own == "safetensors" or hasattr(getattr(default(), section), own), whole


def test_the_example_of_training_from_python_runs(tiny_chat, tmp_path, monkeypatch, capsys):
    [example] = re.findall(r"^```python\n(.*?)^```", (DOCS / "python.md").read_text(), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scores, "SCORES", dict(scores.SCORES))
    Path("model").symlink_to(tiny_chat)
    names = {}
    exec(compile(example, "python.md", "exec"), names)
    shown, loss, answers = capsys.readouterr().out.splitlines()
    # 90 rows are packed into one batch.
    assert re.fullmatch(r"Run\('runs/sums', lora on .*, (\d+) of \1 steps, loss .*\)", shown)
    assert float(loss) > 0 and len(ast.literal_eval(answers)) == 1
    assert "contains" in names["run"].evaluations()[-1]


def test_the_worked_example_of_the_architecture_runs(capsys):
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    [example] = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    names = {}
    exec(compile(example, "architecture.md", "exec"), names)
    loss, shape = capsys.readouterr().out.split(maxsplit=1)
    # A model that knows nothing yet spreads its probability over the 96 tokens.
    assert float(loss) == pytest.approx(math.log(96), rel=0.05)
    assert shape.strip() == "(2, 32, 4)"
    # B starts at zero, so that at first A has no gradient, and B has.
    size = {path[-1]: float(abs(leaf).max()) for path, leaf in flatten(names["gradient"])}
    assert size["lora_A"] == 0 < size["lora_B"]
