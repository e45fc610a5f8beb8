"""The record of a full run (.github/results.json), what the README takes from it, and the README's other numbers."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import conftest
from helpers import fetch

import nbformat
import pytest
from safetensors import safe_open

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOTEBOOKS = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
# Numbers of these sections are checked by these files.
ELSEWHERE = {"In a class": "test_classroom.py", "Colab": "test_colab.py", "The course as a web site": "test_site.py"}
# Digits that are part of a name.
NAMES = r"SmolLM2-135M(-Instruct)?|smollm2-135m|Apache-2\.0|SHA-256|\b4[- ]bits?\b|NF4|[Nn]otebook \d\d\b|^\| \d\d \|"

spec = importlib.util.spec_from_file_location("results", ROOT / ".github" / "results.py")
results = importlib.util.module_from_spec(spec)
spec.loader.exec_module(results)


@pytest.fixture
def record(request):
    """The stored record. A run that is about to replace it has none to compare with."""
    if request.config.option.results and request.config.option.results.resolve() == results.RECORD:
        return None
    return json.loads(results.RECORD.read_text(encoding="utf-8"))


def test_the_stored_record_is_of_a_full_run_without_failures(record):
    if record is None:
        return
    results.check(record, NOTEBOOKS)
    assert set(record["tests"]["skipped"]) <= set(conftest.ALLOWED_SKIPS)
    for name in ("00_start_here", "08_qlora", "12_your_own_data"):  # those that train the real model
        lines = "\n".join(record["notebooks"][name]["lines"])
        assert "loss" in lines, name
        assert re.search(r"[Ee]xact match|right", lines), name


def test_the_readme_is_what_the_record_makes(record):
    if record is not None:
        assert results.render(README, record) == README, "run `python .github/results.py`"


def _printed(name):
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    return "\n".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


def _parameters(folder):
    with safe_open(folder / "model.safetensors", "np") as weights:
        names = weights.keys()
        return sum(weights.get_tensor(name).size for name in names)


def test_every_number_in_the_readme_comes_from_somewhere(record):
    printed = _printed("00_start_here")
    before, of = re.search(r"exact match before: (\d+) of (\d+)", printed).groups()
    assert before == "0"
    assert f"exact match after: {of} of {of}" in printed
    steps = re.findall(r"step +(\d+) of \1: loss", printed)
    million = int(re.search(r"([\d,]+) parameters in", printed)[1].replace(",", "")) / 1e6
    wheel = re.search(r"wheel (\d+ MB)", Path(fetch.__file__).read_text(encoding="utf-8"))[1]
    sentences = [
        f"Exact match on {of} held-out requests: 0 % before, 100 % after",
        f"It gets none of {of} right. After {steps[-1]} steps of LoRA",
        f"with {million:.0f} million parameters",
        f"a Llama of {_parameters(ROOT / 'helpers' / 'assets' / 'tiny') / 1e6:.2f} million parameters",
        f"Python {_python()} or newer",
        f"downloads the model ({wheel})",
    ]
    text = README
    if record is not None:
        packages, model = (record["bytes"][name] / 1e9 for name in ("packages", "model"))
        sentences += [
            f"about {packages + model:.1f} GB of disk",
            f"({packages:.1f} GB of packages and {model:.1f} GB for the model, measured",
            results.paragraph(record),
        ]
        for found in record["notebooks"].values():
            text = text.replace(f" {found['seconds']:.0f} |\n", "\n")
    for heading, file in ELSEWHERE.items():
        if f"## {heading}\n" in text:
            assert "README" in (ROOT / "tests" / file).read_text(encoding="utf-8"), file
            text = re.sub(rf"^## {heading}\n.*?(?=^## )", "", text, flags=re.M | re.S)
    for sentence in sentences:
        assert sentence in text
        text = text.replace(sentence, "")
    text = re.sub(r"^```.*?^```|`[^`\n]*`|\]\([^)]*\)", "", text, flags=re.M | re.S)
    text = re.sub(NAMES, "", text, flags=re.M)
    if record is not None:
        assert [line for line in text.splitlines() if re.search(r"\d", line)] == []


def _python():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'requires-python = ">=([\d.]+)"', pyproject)[1]


# The command that writes the README, over records that are wrong and READMEs that are out of date.

SMALL = {
    "complete": True, "command": "pytest", "date": "2026-11-22", "device": "2 CPU cores", "system": "Linux",
    "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.23.0", "peft": "0.21.2",
                 "bitsandbytes": "0.50.2"},
    "seconds": 1500, "tests": {"passed": 1234, "failed": 0, "skipped": {"needs a CUDA GPU": 3, "needs a tail": 1}},
    "notebooks": {"00_a": {"seconds": 61.4, "passed": 1000, "failed": 0, "uncompared": 1, "lines": []},
                  "01_b": {"seconds": 9.6, "passed": 2, "failed": 0, "uncompared": 2, "lines": []}},
}  # fmt: skip
PLACE = """# Title 1
<!-- results:begin -->

| | notebook | seconds |
|---|---|---:|
| 00 | [A](notebooks/00_a.ipynb) | 0 |
| 01 | [B](notebooks/01_b.ipynb) | |

Prose that stays, 1.

**Where the results were measured.** Long ago.

<!-- results:end -->
| 00 | [A](notebooks/00_a.ipynb) | 0 |
"""


def test_the_numbers_come_into_their_places_and_all_else_stays():
    text = results.render(PLACE, SMALL)
    assert "| 00 | [A](notebooks/00_a.ipynb) | 61 |\n| 01 | [B](notebooks/01_b.ipynb) | 10 |\n\nProse that" in text
    assert "On 22 November 2026, on a Linux machine with 2 CPU cores, Python 3.11, torch 2.13.0, transfor" in text
    assert "peft 0.21.2 and bitsandbytes 0.50.2: all 1,002 code cells" in text
    assert "printed what is stored in them (3 are left uncompared" in text
    assert "and 1,234 tests passed, in 25 minutes altogether. " in text
    assert "Tests skipped: 3 (needs a CUDA GPU), 1 (needs a tail). The seconds" in text
    assert text.endswith("<!-- results:end -->\n| 00 | [A](notebooks/00_a.ipynb) | 0 |\n")
    assert results.render(text, SMALL) == text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<!-- results:begin -->", "", "the lines <!-- results:begin -->"),
        ("| 01 | [B](notebooks/01_b.ipynb) | |\n", "", "one row for 01_b.ipynb"),
        ("**Where the results", "**Where results", "a paragraph"),
    ],
)
def test_a_readme_without_a_place_is_refused(old, new, message):
    with pytest.raises(ValueError, match=rf"^README\.md: .*{message}"):
        results.render(PLACE.replace(old, new), SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"complete": False, "command": "pytest tests"}, "of a part, `pytest tests`"),
        ({"tests": {"passed": 1, "failed": 2, "skipped": {}}}, "failures, in 2 tests"),
        ({"notebooks": {"00_a": {"failed": 1}, "01_b": {"failed": 0}}}, r"\['00_a'\]"),
        ({"notebooks": {"00_a": {"failed": 0}}}, r"differ in \['01_b'\]"),
    ],
)
def test_a_record_that_is_not_of_a_full_run_is_refused(change, message):
    results.check(SMALL, {"00_a", "01_b"})
    with pytest.raises(ValueError, match=message):
        results.check(SMALL | change, {"00_a", "01_b"})


# `pytest --results FILE`, really run.

TESTS = """
import pytest

def test_passes():
    pass

@pytest.mark.offline
def test_of_a_group():
    assert False

@pytest.mark.skip(reason="too tired")
def test_skips():
    pass

@pytest.mark.skip(reason="needs a GPU with bf16")
def test_skips_rightly():
    pass

@pytest.mark.cuda
def test_of_the_gpu():
    pass
"""
CELLS = [
    ("step  2 of 12: loss 3.00", "step  2 of 12: loss 3.00"),
    ("step 12 of 12: loss 0.50\nExact match: 7 of 8", "step 12 of 12: loss 0.50\nExact match: 7 of 8"),
    ("64 of 64", "63 of 64"),
]


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course of five tests and a notebook of three cells, with this one's conftest.py and settings."""
    folder = tmp_path_factory.mktemp("course")
    for name in ("conftest.py", "pyproject.toml", "tests/nbval_sanitize.ini"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    (folder / "tests" / "test_small.py").write_text(TESTS, encoding="utf-8")
    cells = []
    for number, (printed, stored) in enumerate(CELLS, start=1):
        cells.append(nbformat.v4.new_code_cell(f"print({printed!r})", execution_count=number))
        cells[-1].outputs = [nbformat.v4.new_output("stream", name="stdout", text=f"{stored}\n")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    (folder / "notebooks").mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / "notebooks" / "00_a.ipynb")
    return folder


def test_a_run_is_recorded(course):
    """In CI: there a skip for a reason that is not allowed is a failure."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"CI": "true", "LORA_LAB_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "--results", "results.json"]
    run = subprocess.run(command, cwd=course, capture_output=True, text=True, env=environment)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "skipped in CI, for a reason that conftest.py does not allow: too tired" in run.stdout
    record = json.loads((course / "results.json").read_text(encoding="utf-8"))
    assert record["complete"]
    assert record["command"] == "pytest"
    skipped = {"needs a GPU with bf16": 1, "needs a CUDA GPU": 1}
    assert record["tests"] == {"passed": 1, "failed": 1, "skipped": skipped}
    notebook = record["notebooks"]["00_a"]
    assert notebook.pop("seconds") > 0
    assert notebook == {"passed": 2, "failed": 1, "uncompared": 0, "lines": CELLS[1][0].splitlines()}
    assert record["device"].endswith(" CPU cores")
    assert record["versions"]["torch"] == conftest.torch.__version__
    assert 1e8 < record["bytes"]["packages"] < 20e9


def _config(*arguments, file="results.json"):
    options = SimpleNamespace(results=Path(file), markexpr="cuda")
    return SimpleNamespace(option=options, invocation_params=SimpleNamespace(args=arguments))


@pytest.mark.parametrize(
    "argument", ["tests", "notebooks", "-m", "-kloss", "--nbval-lax", "--deselect=x", "--ignore=tests", "-x", "--lf"]
)
def test_a_run_of_a_part_is_not_taken_for_a_full_one(argument, monkeypatch):
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    harmless = ("--results", "results.json", "--results=results.json", "--durations=10", "-q", "-vv")
    assert conftest.chosen(_config(*harmless)) == []
    assert conftest.chosen(_config(*harmless, argument)) == [argument]
    monkeypatch.setenv("PYTEST_ADDOPTS", argument)
    assert conftest.chosen(_config(*harmless)) == [argument]


@pytest.mark.parametrize(("status", "collected"), [(0, 2), (1, 2), (2, 1), (3, 1), (5, 1)])
def test_a_run_that_is_cut_short_writes_nothing(status, collected, tmp_path):
    record = conftest.Record(_config("tests", file=tmp_path / "results.json"))
    record.outcomes["the one test that ran"] = "passed"
    record.pytest_sessionfinish(SimpleNamespace(testscollected=collected), status)
    assert not list(tmp_path.iterdir())
    assert "the run was cut short" in record.message


def test_the_folder_of_the_record_must_be_there(tmp_path):
    with pytest.raises(pytest.UsageError, match=r"make the folder .*missing first"):
        conftest.Record(_config(file=tmp_path / "missing" / "results.json"))


def test_who_asks_for_the_gpu_must_have_one(monkeypatch):
    item = SimpleNamespace(config=_config(), get_closest_marker=lambda name: name == "cuda")
    monkeypatch.setattr(conftest.torch.cuda, "is_available", lambda: False)
    with pytest.raises(pytest.fail.Exception, match="needs a CUDA GPU"):
        conftest.pytest_runtest_setup(item)
    item.config.option.markexpr = "not offline"
    with pytest.raises(pytest.skip.Exception, match="needs a CUDA GPU"):
        conftest.pytest_runtest_setup(item)
