"""The hand-out: each notebook without its solutions, made by the README's command, is whole and runs."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRESS = "from helpers.checks import progress\n\nprogress(checks)"

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def _code(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def _tags(cell):
    return set(cell.metadata.get("tags", []))


def _tagged(cells, tag):
    return [cell for cell in cells if tag in _tags(cell)]


def _tree(cell):
    return ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", cell.source, flags=re.M))


def _bound(cell):
    """The names that a cell binds where the next cells see them: not those of a comprehension or a function's body."""
    names, nodes = set(), [_tree(cell)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif not isinstance(node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            nodes += ast.iter_child_nodes(node)
    return names


def _read_names(cell):
    return {node.id for node in ast.walk(_tree(cell)) if isinstance(node, ast.Name)}


@pytest.fixture(scope="module")
def hand_outs(tmp_path_factory):
    """The folder that the README's command makes, from a copy of the notebooks."""
    folder = tmp_path_factory.mktemp("class")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns("outputs", ".*"))
    [command] = re.findall(r"^jupyter nbconvert (?:.*\\\n)*.*", README, flags=re.M)
    *words, files = shlex.split(command.replace("\\\n", " "))
    command = [sys.executable, "-m", *words, *map(str, sorted(folder.glob(files)))]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert sorted(path.name for path in (folder / "hand_out").iterdir()) == [path.name for path in NOTEBOOKS]
    return folder / "hand_out"


@pytest.mark.slow
@each_notebook
def test_nothing_is_missing_but_the_solutions(path, hand_outs):
    full = nbformat.read(path, as_version=4)
    hand_out = nbformat.read(hand_outs / path.name, as_version=4)
    nbformat.validate(hand_out)
    kept = [cell for cell in full.cells if "solution" not in _tags(cell)]
    whole = [
        [(cell.id, cell.cell_type, cell.source, _tags(cell)) for cell in cells] for cells in (hand_out.cells, kept)
    ]
    assert whole[0] == whole[1]
    assert hand_out.metadata.kernelspec == full.metadata.kernelspec
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in hand_out.cells)


@each_notebook
def test_exercises_come_in_threes(path):
    """A stub, its check, its solution, all of one function."""
    cells = _code(path)
    tags = [tag for cell in cells for tag in ("exercise", "check", "solution") if tag in _tags(cell)]
    assert tags == ["exercise", "check", "solution"] * (len(tags) // 3)
    for exercise, check, solution in zip(*(_tagged(cells, tag) for tag in tags[:3]), strict=True):
        (name,) = _bound(exercise)
        assert "raise NotImplementedError" in exercise.source
        assert check.source == f"checks.{name}({name})"
        assert check.source in solution.source.splitlines()
        assert name in _bound(solution)


@pytest.mark.slow
@each_notebook
def test_no_later_cell_needs_a_solution(path, hand_outs):
    """Neither a learner's function nor what only a solution defines is used, or overwritten, by another cell."""
    theirs = set().union(*(_bound(cell) for tag in ("exercise", "solution") for cell in _tagged(_code(path), tag)))
    for cell in _code(hand_outs / path.name):
        if not _tags(cell) & {"exercise", "check"}:
            assert not _read_names(cell) & theirs, cell.source
            assert not _bound(cell) & theirs, cell.source


@each_notebook
def test_the_last_cell_counts_the_exercises(path):
    cells = _code(path)
    exercises = len(_tagged(cells, "exercise"))
    counting = [cell for cell in cells if re.search(r"\bprogress\(", cell.source)]
    if not exercises:
        assert not counting
        return
    assert [cell.source for cell in counting] == [PROGRESS]
    last = max(cells.index(cell) for cell in _tagged(cells, "solution"))
    assert cells.index(counting[0]) > last
    assert [output.text for output in counting[0].outputs] == [f"Exercises: {exercises} of {exercises} correct.\n"]


@pytest.mark.handout
@each_notebook
def test_a_hand_out_runs_from_top_to_bottom(path, hand_outs, tmp_path, request):
    if "smollm2-135m" in path.read_text(encoding="utf-8"):
        request.getfixturevalue("smollm2")
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute", "--output-dir", tmp_path]
    command += ["--ExecutePreprocessor.timeout=900", hand_outs / path.name]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]  # a cell that raises stops it
    cells = _code(tmp_path / path.name)
    assert all(cell.execution_count for cell in cells)
    names = [name for cell in _tagged(cells, "exercise") for name in _bound(cell)]
    said = ["".join(output.get("text", "") for output in cell.outputs) for cell in _tagged(cells, "check")]
    assert [text.split(". ")[0] for text in said] == [f"{name}: not written yet" for name in names]
    for cell in cells:
        if cell.source == PROGRESS:
            assert cell.outputs[0].text == f"Exercises: 0 of {len(names)} correct. Not written: {', '.join(names)}.\n"
