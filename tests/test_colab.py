"""Colab: the block that installs the course, the versions that are there, and our address.

Each tests/colab_*.txt has the pins of one state of Colab, with its source, its date and its version of Python.
"""

import importlib.util
import json
import platform
import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

from helpers.memory import estimate_training_memory

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from transformers import LlamaConfig

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ADDRESS = PROJECT["urls"]["Repository"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LISTS = sorted((ROOT / "tests").glob("colab_*.txt"))
WHOLE_LIST = ROOT / "tests" / "colab_2026-06.txt"
# What the setup cell installs on Colab, where it is missing, with the package itself.
MISSING_THERE = {"bitsandbytes", "colorlog", "gguf", "optuna"}
BLOCK = f"""\
import os
from importlib.util import find_spec

if "COLAB_RELEASE_TAG" in os.environ and not find_spec("helpers"):  # once on Colab: install what is missing there
    %pip install -q "lora-lab[colab] @ git+{ADDRESS}"
    %pip uninstall -q -y torchao
"""
COMMANDS = [("pip", f'install -q "lora-lab[colab] @ git+{ADDRESS}"'), ("pip", "uninstall -q -y torchao")]

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def _pins(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pins}


def _python(path):
    return re.search(r"^# Python: (3\.\d+)$", path.read_text(encoding="utf-8"), flags=re.M)[1]


def _requirements(lines):
    """The requirements of `lines` that hold on Colab."""
    linux = {"sys_platform": "linux", "platform_system": "Linux", "python_version": "3.13", "extra": ""}
    parsed = map(Requirement, lines)
    return [requirement for requirement in parsed if requirement.marker is None or requirement.marker.evaluate(linux)]


def _code(path):
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@each_notebook
def test_the_setup_cell_begins_with_the_block(path):
    setup, *others = _code(path)
    assert setup.startswith(BLOCK + "\n")
    rest = "\n".join([setup.removeprefix(BLOCK), *others])
    assert "COLAB_RELEASE_TAG" not in rest
    assert not re.search(r"^\s*(!|%(pip|conda|uv)\b)", rest, flags=re.M), "a command that would run outside Colab too"


@pytest.mark.parametrize(("on_colab", "installed"), [(True, False), (True, True), (False, False), (False, True)])
def test_the_block_installs_once_on_colab_and_does_nothing_elsewhere(on_colab, installed, monkeypatch, capsys):
    run = []

    class Shell:
        def run_line_magic(self, *command):
            run.append(command)

    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    if on_colab:
        monkeypatch.setenv("COLAB_RELEASE_TAG", "2026.07")
    found = {"helpers": object() if installed else None}
    monkeypatch.setattr(importlib.util, "find_spec", found.__getitem__)
    exec(TransformerManager().transform_cell(BLOCK), {"get_ipython": Shell})
    assert run == (COMMANDS if on_colab and not installed else [])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_pip_replaces_nothing_on_colab(path):
    """Colab's version satisfies each bound of ours, and each bound of the packages that are missing there."""
    pins, met = _pins(path), set()
    assert pins.keys() >= {"torch", "numpy", "ipywidgets"}
    assert Version(_python(path)) in Requirement(f"python{PROJECT['requires-python']}").specifier
    needed = _requirements(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["colab"])
    while needed:
        requirement = needed.pop()
        name = canonicalize_name(requirement.name)
        if name in pins:
            assert requirement.specifier.contains(pins[name]), f"{requirement} is needed, and Colab has {pins[name]}"
        elif name in MISSING_THERE and name not in met:
            needed += _requirements(metadata.requires(name) or [])
        met.add(name)
    assert met >= MISSING_THERE
    if path == WHOLE_LIST:
        assert met - pins.keys() == MISSING_THERE


@each_notebook
def test_the_smallest_runtime_is_named_and_fits(path):
    """Every notebook runs on a CPU; one that takes the profile's model says so, and that model fits a T4."""
    header = nbformat.read(path, as_version=4).cells[0].source
    named = re.search(r"\*\*Smallest Colab runtime:\*\* ([^\n]+)", header)[1]
    code = "\n".join(_code(path))
    assert set(re.findall(r'load_base\(\s*"([^"]+)"', code)) <= {"tiny", "smollm2-135m"}
    assert named.startswith("CPU")
    assert ("T4" in named) == ("profile.model" in code), named
    if "profile.model" not in code:
        return
    config = json.loads((ROOT / "helpers" / "assets" / "configs" / "smollm2-1.7b.json").read_text(encoding="utf-8"))
    quantization = "nf4" if "load_base(profile.model, quantization=quantization)" in code else None
    step = estimate_training_memory(
        LlamaConfig(**config), r=16, quantization=quantization, dtype="float16", batch_size=8, sequence_length=128
    )
    assert re.search(r'per_device_train_batch_size(=|": )8\b', code)
    assert step.total < 8 * 2**30  # Colab's T4 has 14.6 GiB, and the CUDA context takes some of it


def test_the_readme_names_versions_that_the_tests_have():
    section = re.search(r"^## Colab\n(.*?)^## ", README, flags=re.M | re.S)[1]
    named = re.findall(r"(Python|[a-z]+) (\d+(?:\.\d+)+)", section)
    assert {"Python", "torch", "transformers", "peft", "ipywidgets"} <= {name for name, _ in named}
    tested = {("Python", _python(path)) for path in LISTS}
    assert set(named) <= tested | {(name, str(version)) for path in LISTS for name, version in _pins(path).items()}


@pytest.mark.colab
def test_this_is_colab_s_environment():
    """After the setup cell: all that was there is as it was, but for torchao, and what was missing is there."""
    [pins] = [_pins(path) for path in LISTS if platform.python_version().startswith(f"{_python(path)}.")]
    installed = {canonicalize_name(found.name): Version(found.version) for found in metadata.distributions()}
    here = {name: Version(installed[name].public) if name in installed else None for name in pins}
    assert {name: found for name, found in here.items() if found != pins[name]} == {"torchao": None}
    assert installed.keys() >= {"lora-lab", *MISSING_THERE}


def test_the_address_is_the_same_everywhere():
    """In every file that git tracks, and in the README's command that sets another one."""
    name = ADDRESS.removeprefix("https://github.com/")
    assert f"git grep -lI {name} | xargs sed -i 's#{name}#OWNER/NAME#g'\n" in README
    run = subprocess.run(["git", "grep", "-lI", name], cwd=ROOT, capture_output=True, text=True, check=True)
    ours = {"CITATION.cff", "README.md", "pyproject.toml", *(f"notebooks/{path.name}" for path in NOTEBOOKS)}
    assert set(run.stdout.split()) >= ours
    for path in NOTEBOOKS:
        text = path.read_text(encoding="utf-8")
        assert set(
            re.findall(r"(?:colab\.research\.google\.com/github/|git\+https://github\.com/)(\w[\w.-]*/[\w.-]*\w)", text)
        ) == {name}
