"""The files around the package say the same as the package."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import helpers

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WORKFLOWS = [path.relative_to(ROOT).as_posix() for path in (ROOT / ".github" / "workflows").glob("*.yml")]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_environment_yml_only_brings_python_and_pip():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python, pip, by_pip = environment["dependencies"]
    assert pip == "pip"
    assert by_pip == {"pip": ["-c constraints.txt", "-e .[lab,test]"]}
    assert python.removeprefix("python").split(",")[0] == PYPROJECT["project"]["requires-python"]
    assert environment["name"] == PYPROJECT["project"]["name"]


def test_every_import_is_declared():
    declared = {Requirement(line).name for line in PYPROJECT["project"]["dependencies"]} | {"helpers"}
    declared |= {"ipykernel", "jupyter_client"}  # doctor looks whether they are there
    for path in (ROOT / "helpers").rglob("*.py"):
        here = declared | ({"trl"} if path.name == "benchmark.py" else set())  # only there, from the extra
        names = set(re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(encoding="utf-8"), flags=re.M))
        assert names <= here | sys.stdlib_module_names, path.name


def test_ci_runs_the_commands_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in (
        'pip install -c constraints.txt -e ".[lab,test]"',
        "pytest",
        "ruff check .",
        "ruff format --check .",
    ):
        assert command in script
        assert command in README


def test_the_lock_has_every_dependency_within_its_bound():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    lock = [Requirement(line) for line in lines if not line.startswith("#")]
    assert not [pin for pin in lock if pin.url or pin.extras or not re.fullmatch(r"==[\w.]+", str(pin.specifier))]
    extras = PYPROJECT["project"]["optional-dependencies"]
    needed = [*PYPROJECT["project"]["dependencies"], *(line for extra in extras.values() for line in extra)]
    for requirement in map(Requirement, needed):
        if requirement.name in ("pip", PYPROJECT["project"]["name"]):  # the first on purpose, see the lock's head
            continue
        pins = [pin for pin in lock if canonicalize_name(pin.name) == canonicalize_name(requirement.name)]
        assert pins, f"{requirement.name} is not in constraints.txt; run `python .github/renew_lock.py`"
        for pin in pins:
            assert requirement.specifier.contains(str(pin.specifier).removeprefix("==")), f"{pin}, and {requirement}"
    for python in ("3.11", "3.12", "3.13"):  # one version of each package on each system and Python
        for system in ("linux", "darwin", "win32"):
            here = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": system}
            names = [pin.name for pin in lock if pin.marker is None or pin.marker.evaluate(here)]
            assert len(names) == len(set(names))
            assert {"torch", "transformers", "peft", "numpy", "jupyterlab", "pytest"} <= set(names)


@pytest.mark.parametrize("file", ["README.md", "environment.yml", ".ci/run", *sorted(WORKFLOWS)])
def test_what_installs_the_course_installs_the_lock(file):
    """Not the jobs that are about other versions, nor Colab, which keeps its own."""
    text = (ROOT / file).read_text(encoding="utf-8")
    text = re.sub(r"--resolution lowest-direct.*|--upgrade .*", "", text)
    for line in re.findall(r"^.*-e \"?\.\[.*$", text, flags=re.M):
        assert "-c constraints.txt" in line or "- -c constraints.txt" in text, f"{file}: {line.strip()}"


@pytest.mark.slow
def test_a_test_that_hangs_is_stopped(tmp_path):
    (tmp_path / "test_slow.py").write_text("import time\n\ndef test_hangs():\n    time.sleep(60)\n")
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), "-o", "timeout=1", "-p"]
    run = subprocess.run([*command, "no:cacheprovider", str(tmp_path)], capture_output=True, text=True)
    assert "1 failed" in run.stdout
    assert "Timeout" in run.stdout
    assert 600 < PYPROJECT["tool"]["pytest"]["ini_options"]["timeout"] <= 1800  # 600 is a cell's own limit


def test_the_readme_lists_every_notebook():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"(notebooks/{path.name})" in README
    for link in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == helpers.__version__
    assert citation["repository-code"] == PYPROJECT["project"]["urls"]["Repository"]
    assert citation["license"] == PYPROJECT["project"]["license"]


@pytest.mark.slow
def test_the_package_ships_its_assets(tmp_path):
    """What a plain (not editable) install gets: the built package has the models, configs and records in it."""
    command = [sys.executable, "-c", "from setuptools import setup; setup()", "-q", "build_py", "-d", str(tmp_path)]
    command += ["egg_info", "-e", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assets, built = ROOT / "helpers" / "assets", tmp_path / "helpers" / "assets"
    shipped = {path.relative_to(assets) for path in assets.rglob("*") if path.is_file()}
    assert {path.relative_to(built) for path in built.rglob("*") if path.is_file()} == shipped
    assert len({path.parts[0] for path in shipped}) >= 2
