"""The package's tree: a small core, and folders for what serves one notebook, one command, the script, the makers."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
HELPERS = ROOT / "helpers"
# In the core though fewer than two notebooks import them, and why.
REASONS = {
    "__init__": "the package",
    "__main__": "the command line; it alone calls helpers.commands",
    "lora": "the subject",
    "quantization": "the subject",
    "meta_step": "a part of memory",
    "fetch": "a part of models",
    "watch": "a part of training",
}
FOLDERS = {"labs", "finetune", "commands", "makers", "checks"}


def imported(source):
    """Return (module, name) for all that a source imports from helpers: `from helpers import a` is a module's name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "helpers":
            for alias in node.names:
                whole = node.module == "helpers" or node.module.removeprefix("helpers.") in FOLDERS
                yield (f"{node.module}.{alias.name}", "") if whole else (node.module, alias.name)


def notebook_imports():
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        lines = "\n".join(cell.source for cell in cells if cell.cell_type == "code").splitlines()
        froms = "\n".join(line for line in lines if re.match(r"from helpers[.\w]* import [\w, ]+$", line))
        yield path.stem, {module for module, _ in imported(froms)}


def sources():
    return {
        path: path.read_text(encoding="utf-8") for path in sorted(HELPERS.rglob("*.py")) if "assets" not in path.parts
    }


def test_the_core_is_small_and_each_module_has_its_reason():
    core = {path.stem for path in HELPERS.glob("*.py")}
    assert {path.name for path in HELPERS.iterdir() if path.is_dir()} - {"__pycache__"} == FOLDERS | {"assets"}
    assert len(core) <= 16
    # 2,300 for all but the findings, which are the course's subject: each is a function, a remedy and its reasons.
    lines = {path.name: len(text.splitlines()) for path, text in sources().items() if path.parent == HELPERS}
    assert lines.pop("diagnose.py") <= 700
    assert sum(lines.values()) <= 2100
    users = [modules for _, modules in notebook_imports()]
    few = {name for name in core if sum(f"helpers.{name}" in modules for modules in users) < 2}
    assert few == REASONS.keys(), "used by fewer than two notebooks: move it to labs, or give the reason"


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(HELPERS).as_posix())
def test_no_import_runs_backwards_and_privates_stay_at_home(path):
    folder = path.relative_to(HELPERS).parts[0] if path.parent != HELPERS else ""
    for module, name in imported(sources()[path]):
        target = module.split(".")[1] if module.count(".") else ""
        assert not name.startswith("_") or name == "__version__", f"{module}.{name} is private"
        if target in FOLDERS and target != folder:
            assert target not in {"makers", "commands"} or path.name == "__main__.py", f"imports {module}"
            assert folder or path.name == "__main__.py", f"the core imports {module}"


@pytest.mark.parametrize(
    "path", [path for path in sources() if path.parent.name != "checks"], ids=lambda path: path.stem
)
def test_functions_are_short(path):
    for node in ast.walk(ast.parse(sources()[path])):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 50, f"{path.name}: {node.name} has {lines} lines"
