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

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_environment_yml_only_brings_python_and_pip():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python, pip, by_pip = environment["dependencies"]
    assert pip == "pip"
    assert by_pip == {"pip": ["-e .[lab,test]"]}
    extras = {"lab", "test", "benchmark", "colab", "site", "browser"}
    assert set(PYPROJECT["project"]["optional-dependencies"]) == extras
    assert python.removeprefix("python").split(",")[0] == PYPROJECT["project"]["requires-python"]
    assert environment["name"] == PYPROJECT["project"]["name"]


def test_every_import_is_declared():
    declared = {Requirement(line).name for line in PYPROJECT["project"]["dependencies"]}
    declared |= {"helpers", "ipykernel", "jupyter_client"}  # the last two: doctor looks whether they are there
    for path in (ROOT / "helpers").rglob("*.py"):
        here = declared | ({"trl"} if path.name == "benchmark.py" else set())  # only there, from the extra
        for name in re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(encoding="utf-8"), flags=re.M):
            assert name in here | sys.stdlib_module_names, f"{path.name} imports {name}"


def test_helpers_modules_are_small_and_keep_their_privates():
    for path in (ROOT / "helpers").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert len(source.splitlines()) <= 280, path.name
        assert not re.search(r"from helpers[.\w]* import [^\n]*\b_[a-z]", source), path.name


@pytest.mark.parametrize("command", ["pip install -e .[lab,test]", "pytest", "ruff check .", "ruff format --check ."])
def test_ci_runs_the_commands_of_the_readme(command):
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").replace('"', "")
    assert command in script
    assert command in README.replace('"', "")


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


def test_the_bug_report_asks_for_the_doctor():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml").read_text(encoding="utf-8"))
    asked = [field for field in form["body"] if "python -m helpers doctor" in str(field)]
    assert any(field.get("validations", {}).get("required") for field in asked)


def test_the_package_ships_its_assets(tmp_path):
    """What a plain (not editable) install gets: the built package has the models, configs and records in it."""
    command = [sys.executable, "-c", "from setuptools import setup; setup()", "-q", "build_py", "-d", str(tmp_path)]
    command += ["egg_info", "-e", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assets, built = ROOT / "helpers" / "assets", tmp_path / "helpers" / "assets"
    shipped = {path.relative_to(assets) for path in assets.rglob("*") if path.is_file()}
    assert {path.relative_to(built) for path in built.rglob("*") if path.is_file()} == shipped
    assert len({path.parts[0] for path in shipped}) >= 2
