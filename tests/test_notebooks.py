"""Hygiene of every committed notebook; that they run and print what they store is nbval's part."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"].removeprefix("https://github.com/")
# Cells whose output depends on the machine. Raise a number only for a reason; the total is meant to stay small.
UNCOMPARED_CELLS = {"00_start_here": 1, "08_qlora": 1, "09_memory_and_speed": 2, "12_your_own_data": 1}


def _read(path):
    return nbformat.read(path, as_version=4)


def _code_cells(path):
    return [cell for cell in _read(path).cells if cell.cell_type == "code"]


each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks_in_reading_order():
    assert NOTEBOOKS
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{i:02d}" for i in range(len(NOTEBOOKS))]


@each_notebook
def test_format_and_kernel(path):
    notebook = _read(path)
    nbformat.validate(notebook)
    assert notebook.nbformat == 4
    assert notebook.nbformat_minor >= 5
    assert notebook.metadata.kernelspec["name"] == "python3"
    assert notebook.metadata.language_info == {"name": "python"}
    assert "widgets" not in notebook.metadata
    assert path.stat().st_size < 2_000_000
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert not any("execution" in cell.metadata for cell in notebook.cells)


@each_notebook
def test_executed_from_top_to_bottom_without_errors(path):
    cells = _code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        expected = "raises-exception" in cell.metadata.get("tags", [])
        assert any(output.output_type == "error" for output in cell.outputs) == expected, cell.source


# What differs from machine to machine, or from run to run: paths, progress bars, times, addresses in memory.
UNSTABLE = re.compile(
    r"(?<![\w.])/(home|root|tmp|usr|opt|work|Users|content|private|var)/|[A-Z]:\\|it/s\]|█"
    r"|\b20\d\d-\d\d-\d\d[T ]\d\d:\d\d|object at 0x"
)


@each_notebook
def test_outputs_hold_no_paths_warnings_or_progress_bars(path):
    for cell in _code_cells(path):
        for output in cell.outputs:
            assert output.get("name") != "stderr", f"{cell.source}\n{output.text}"
            texts = [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
            assert not UNSTABLE.search(text := "\n".join([output.get("text", ""), *texts])), text


@each_notebook
def test_every_figure_is_described_in_one_printed_sentence(path):
    for cell in _code_cells(path):
        for output, following in zip(cell.outputs, [*cell.outputs[1:], {}], strict=False):
            if any(kind.startswith("image/") for kind in output.get("data", {})):
                sentence = following.get("text", "").strip()
                assert following.get("name") == "stdout", f"no sentence after the figure of:\n{cell.source}"
                assert sentence.endswith("."), sentence
                assert len(sentence.split()) > 5, sentence


@each_notebook
def test_header_and_closing_sections(path):
    first, *others = [cell.source for cell in _read(path).cells if cell.cell_type == "markdown"]
    lines = first.splitlines()
    assert lines[0].startswith("# ")
    address = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{path.name}"
    assert f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({address})" in lines
    assert "**You will be able to**" in lines
    assert sum(line.startswith("- ") for line in lines) == 3
    assert re.search(r"\*\*Time:\*\* \d+ minutes to read, \d+ minutes? to run", first)
    assert "**Builds on:**" in first
    headings = re.findall(r"^## .*", "\n".join(others), flags=re.M)
    assert {"## What to remember", "## Where it goes wrong", "## Read more"} <= set(headings)


@each_notebook
def test_cells_are_short(path):
    for cell in _code_cells(path)[1:]:  # the first is the set-up
        assert len(cell.source.splitlines()) <= 30, cell.source


def test_few_cells_are_left_uncompared():
    def left_out(cell):
        tags = {"nbval-ignore-output", "nbval-skip"} & set(cell.metadata.get("tags", []))
        return tags or re.search(r"#\s*NBVAL_(IGNORE_OUTPUT|SKIP)", cell.source)

    found = {path.stem: sum(map(bool, map(left_out, _code_cells(path)))) for path in NOTEBOOKS}
    assert {name: count for name, count in found.items() if count} == UNCOMPARED_CELLS


@pytest.mark.slow
def test_type_hints(tmp_path):
    """mypy over the package, and over each notebook's code as a module of its own."""
    files = ["helpers"]
    for path in NOTEBOOKS:
        for version, left_out in (("hand_out", {"solution"}), ("solved", {"exercise", "check"})):
            module = tmp_path / f"{version}_{path.stem}.py"
            cells = [cell.source for cell in _code_cells(path) if not left_out & set(cell.metadata.get("tags", []))]
            source = re.sub(r"^(\s*)[%!].*$", r"\1pass", "\n\n".join(cells), flags=re.M)
            module.write_text(source + "\n", encoding="utf-8")
            files.append(str(module))
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), *files]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
