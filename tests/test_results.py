"""The records of runs (.github/results), and the README's tables, which are made from them."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import conftest

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

spec = importlib.util.spec_from_file_location("results", ROOT / ".github" / "results.py")
results = importlib.util.module_from_spec(spec)
spec.loader.exec_module(results)


@pytest.fixture
def records(request):
    """The stored records. While a run makes a new one, README and records need not fit: then there is nothing."""
    target = request.config.option.results
    return None if target and target.resolve().parent == results.RECORDS else results.stored()


def test_the_readme_is_what_the_records_make(records):
    if records is not None:
        assert results.render(README, records) == README, "run `python .github/results.py`"


def test_the_lock_s_record_is_of_a_full_run_on_these_versions(records):
    """Failures, if there were any, are in the README's row."""
    if records is None:
        return
    lock = records["lock"]
    assert (lock["complete"], lock["off_lock"]) == (True, {}), lock["command"]
    # In the stored run one function of a notebook had no type hints, which it has now; the next is to have no failure.
    assert set(lock["failed"]) <= {"tests/test_notebooks.py::test_type_hints"}
    assert set(lock["notebooks"]) == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert set(lock["tests"]["skipped"]) <= set(conftest.ALLOWED_SKIPS)
    # The record was made with this constraints.txt, and not with an older one.
    pins = {line.partition(" ")[0] for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()}
    ran = {f"{name}=={version.split('+')[0]}" for name, version in lock["versions"].items()}
    assert {pin.split("==")[0] for pin in ran - pins} <= {"python", "pip"}


def test_the_lower_bounds_are_the_versions_of_the_lowest_record(records):
    """Whoever changes a bound runs the tests with it: `uv pip install --resolution lowest-direct`, as in tests.yml."""
    if records is None:
        return
    assert records["lowest"]["failed"] == []
    versions = records["lowest"]["versions"]
    for requirement in map(Requirement, PROJECT["dependencies"]):
        bounds = [Version(part.version) for part in requirement.specifier if part.operator == ">="]
        ran = Version(Version(versions[requirement.name]).public)
        # An extra asks for a newer psutil; its bound is Colab's.
        assert requirement.name in ("pip", "psutil") or bounds == [ran], requirement


def test_colab_s_records_have_the_versions_of_its_lists(records):
    for name in ("colab-2026-06", "colab-2026-08") if records is not None else ():
        lines = (ROOT / "tests" / f"{name.replace('-', '_', 1)}.txt").read_text(encoding="utf-8").splitlines()
        pins = dict(line.split("==") for line in lines if not line.startswith("#"))
        versions = {name: version.split("+")[0] for name, version in records[name]["versions"].items()}
        assert not {name for name in pins.keys() & versions.keys() if pins[name] != versions[name]}


# The command that writes the README.

SMALL = {
    "command": "pytest", "date": "2026-11-22", "device": "2 CPU cores", "system": "Linux", "off_lock": {},
    "versions": dict.fromkeys(results.NAMED, "1.0+cpu"), "tests": {"passed": 5, "failed": 0, "skipped": {}},
    "seconds": 60, "notebooks": {"00_a": {"seconds": 61.4, "passed": 1, "failed": 0, "uncompared": 0, "lines": []}},
}  # fmt: skip
BEGIN, END = results.MARKERS
OUTSIDE = "| 00 | [A](notebooks/00_a.ipynb) | 0 |\n"
PLACE = f"# 1\n{BEGIN}\n{OUTSIDE}\nProse.\n\n{results.HEADING} Long ago.\n\n{END}\n{OUTSIDE}"


def test_the_numbers_come_into_their_places_and_all_else_stays():
    text = results.render(PLACE, {"lock": SMALL})
    assert text.startswith(f"# 1\n{BEGIN}\n{OUTSIDE.replace('| 0 |', '| 61 |')}\nProse.\n\n{results.HEADING}")
    assert text.endswith(f"\n\n{END}\n{OUTSIDE}")
    assert "Long ago" not in text
    assert results.render(text, {"lock": SMALL}) == text


@pytest.mark.parametrize("missing", [BEGIN, "[A](notebooks/00_a.ipynb)", results.HEADING])
def test_a_readme_without_a_place_is_refused(missing):
    with pytest.raises(ValueError, match=r"^README\.md: .*(missing|one row for 00_a)"):
        results.render(PLACE.replace(missing, "", 1), {"lock": SMALL})


# `pytest --results FILE`, really run.

TESTS = """
import pytest

def test_passes(): pass

@pytest.mark.offline
def test_of_a_group(): assert False

@pytest.mark.skip(reason="too tired")
def test_skips(): pass

@pytest.mark.skip(reason="needs a GPU with bf16")
def test_skips_rightly(): pass

@pytest.mark.slow
def test_is_slow(): pass

@pytest.mark.cuda
def test_of_the_gpu(): pass
"""
CELLS = [
    ("step  2 of 12: loss 3.00", "step  2 of 12: loss 3.00"),
    ("step 12 of 12: loss 0.50\nExact match: 7 of 8", "step 12 of 12: loss 0.50\nExact match: 7 of 8"),
    ("64 of 64", "63 of 64"),
]


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course of six tests and a notebook of three cells, with this one's conftest.py and settings."""
    folder = tmp_path_factory.mktemp("course")
    for name in ("conftest.py", "pyproject.toml", "tests/nbval_sanitize.ini"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    lock = ["# a comment", f"torch=={conftest.torch.__version__.split('+')[0]}", "numpy==1.0", "absent==2.0"]
    lock.append("pytest==0.1 ; sys_platform == 'another'")
    (folder / "constraints.txt").write_text("\n".join(lock), encoding="utf-8")
    (folder / "tests" / "test_small.py").write_text(TESTS, encoding="utf-8")
    cells = []
    for number, (printed, stored) in enumerate(CELLS, start=1):
        cells.append(nbformat.v4.new_code_cell(f"print({printed!r})", execution_count=number))
        cells[-1].outputs = [nbformat.v4.new_output("stream", name="stdout", text=f"{stored}\n")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    (folder / "notebooks").mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / "notebooks" / "00_a.ipynb")
    return folder


@pytest.mark.slow
def test_a_run_is_recorded(course):
    """In CI: there a skip for a reason that is not allowed is a failure, as is one changed digit in a stored output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"CI": "true", "LORA_LAB_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "--slow", "--results", "results.json"]
    run = subprocess.run(command, cwd=course, capture_output=True, text=True, env=environment)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "skipped in CI, for a reason that conftest.py does not allow: too tired" in run.stdout
    record = json.loads((course / "results.json").read_text(encoding="utf-8"))
    assert record["complete"]
    assert record["command"] == "pytest --slow"
    skipped = {"needs a GPU with bf16": 1, "needs a CUDA GPU": 1}
    assert record["tests"] == {"passed": 2, "failed": 1, "skipped": skipped}
    assert record["failed"] == ["tests/test_small.py::test_skips", "notebooks/00_a.ipynb::Cell 2"]
    assert list(record["off_lock"]) == ["numpy"]
    notebook = record["notebooks"]["00_a"]
    assert notebook.pop("seconds") > 0
    assert notebook == {"passed": 2, "failed": 1, "uncompared": 0, "lines": CELLS[1][0].splitlines()}
    assert record["device"].endswith(" CPU cores")
    assert record["versions"]["torch"] == conftest.torch.__version__
    assert 1e8 < record["bytes"]["packages"] < 20e9
    subprocess.run([*command, "tests"], cwd=course, capture_output=True, env=environment)
    assert json.loads((course / "results.json").read_text(encoding="utf-8"))["complete"] is False


@pytest.mark.slow
def test_slow_tests_are_left_out_unless_asked_for(course):
    for more, count in (([], "4/6"), (["--slow"], "5/6"), (["-m", "slow"], "1/6"), (["-m", "offline"], "1/6")):
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests", *more]
        run = subprocess.run(command, cwd=course, capture_output=True, text=True)
        assert f"{count} tests collected" in run.stdout, run.stdout
        assert ("test_is_slow" in run.stdout) == ("slow" in "".join(more)), run.stdout


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
