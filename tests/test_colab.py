"""Colab: the block that installs the course, the versions that are there, and the command that sets our address.

Each tests/colab_*.txt has the pins of one state of Colab, with its source, its date and its version of Python.
"""

import importlib.util
import json
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from helpers import hardware
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
ADDRESS = PROJECT["urls"]["Repository"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LISTS = sorted((ROOT / "tests").glob("colab_*.txt"))
WHOLE_LIST = ROOT / "tests" / "colab_2026-06.txt"
SET_REPOSITORY = ROOT / ".github" / "set_repository.py"
# What the setup cell installs on Colab, where it is missing, with the package itself.
MISSING_THERE = {"bitsandbytes", "colorlog", "gguf", "optuna"}
BLOCK = f"""\
import os
from importlib.util import find_spec

if "COLAB_RELEASE_TAG" in os.environ and not find_spec("helpers"):  # once on Colab: install what is missing there
    %pip install -q "lora-lab[colab] @ git+{ADDRESS}"
    %pip uninstall -q -y torchao
"""
INSTALL = ("pip", f'install -q "lora-lab[colab] @ git+{ADDRESS}"')
UNINSTALL = ("pip", "uninstall -q -y torchao")

each_list = pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def _pins(path):
    pins = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            (specifier,) = Requirement(line).specifier
            assert specifier.operator == "=="
            pins[canonicalize_name(Requirement(line).name)] = Version(specifier.version)
    return pins


def _python(path):
    return re.search(r"^# Python: (3\.\d+)$", path.read_text(encoding="utf-8"), flags=re.M)[1]


def _requirements(lines):
    """The requirements of `lines` that hold on Colab."""
    linux = {"sys_platform": "linux", "platform_system": "Linux", "python_version": "3.13", "extra": ""}
    parsed = map(Requirement, lines)
    return [requirement for requirement in parsed if requirement.marker is None or requirement.marker.evaluate(linux)]


def _cells(path):
    return nbformat.read(path, as_version=4).cells


def _code(path):
    return "\n".join(cell.source for cell in _cells(path) if cell.cell_type == "code")


@each_notebook
def test_the_setup_cell_begins_with_the_block(path):
    setup, *others = [cell.source for cell in _cells(path) if cell.cell_type == "code"]
    assert setup.startswith(BLOCK + "\n")
    rest = "\n".join([setup.removeprefix(BLOCK), *others])
    assert "COLAB_RELEASE_TAG" not in rest
    assert not re.search(r"^\s*(!|%(pip|conda|uv)\b)", rest, flags=re.M), "a command that would run outside Colab too"


@pytest.mark.parametrize(
    ("tag", "installed", "commands"),
    [("2026.07", False, [INSTALL, UNINSTALL]), ("2026.07", True, []), (None, False, []), (None, True, [])],
)
def test_the_block_installs_once_on_colab_and_does_nothing_elsewhere(tag, installed, commands, monkeypatch, capsys):
    run = []

    class Shell:
        def run_line_magic(self, *command):
            run.append(command)

    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    if tag:
        monkeypatch.setenv("COLAB_RELEASE_TAG", tag)
    found = {"helpers": object() if installed else None}
    monkeypatch.setattr(importlib.util, "find_spec", found.__getitem__)
    exec(TransformerManager().transform_cell(BLOCK), {"get_ipython": Shell})
    assert run == commands
    assert capsys.readouterr() == ("", "")


def test_the_lists_say_what_they_are():
    assert len(LISTS) >= 2
    for path in LISTS:
        text = path.read_text(encoding="utf-8")
        assert re.search(r"^# Source: .*pip-freeze\.gpu\.txt", text, flags=re.M)
        assert re.search(r"^# Date: .*2026", text, flags=re.M)
        pins = [line.split("==")[0] for line in text.splitlines() if not line.startswith("#")]
        assert pins == sorted(set(pins), key=str.lower)
        assert Version(_python(path)) in Requirement(f"python{PROJECT['requires-python']}").specifier


@each_list
def test_pip_replaces_nothing_on_colab(path):
    """Colab's version satisfies each bound of ours, and each bound of the packages that are missing there."""
    pins, met = _pins(path), set()
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
    for kept in ("torch", "numpy", "ipywidgets"):
        assert kept in pins


@each_notebook
def test_the_smallest_runtime_is_named_and_fits(path):
    """Every notebook runs on a CPU; one that takes the profile's model says so, and that model fits a T4."""
    named = re.search(r"\*\*Smallest Colab runtime:\*\* ([^\n]+)", _cells(path)[0].source)[1]
    code = _code(path)
    models = set(re.findall(r'load_base\(\s*"([^"]+)"', code))
    assert models <= {"tiny", "smollm2-135m"}
    assert named.startswith("CPU")
    larger = "profile.model" in code
    assert ("T4" in named) == larger, f"{named}: it takes {'the profile’s model' if larger else sorted(models)}"
    if 'os.environ["LORA_LAB_DEVICE"] = "cpu"' in code:
        assert named == "CPU."
    if not larger:
        return
    config = json.loads((ROOT / "helpers" / "assets" / "configs" / "smollm2-1.7b.json").read_text(encoding="utf-8"))
    quantization = "nf4" if "load_base(profile.model, quantization=quantization)" in code else None
    step = estimate_training_memory(
        LlamaConfig(**config), r=16, quantization=quantization, dtype="float16", batch_size=8, sequence_length=128
    )
    assert re.search(r'per_device_train_batch_size(=|": )8\b', code)
    assert step.total < 14.6 * 2**30  # the memory of Colab's T4, and the CUDA context takes some of it
    assert step.total < 8 * 2**30


def test_a_runtime_without_a_gpu_takes_the_small_model(monkeypatch):
    """Colab's GPUs (T4, L4, A100) are told apart in test_doctor.py."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    monkeypatch.delenv("LORA_LAB_DEVICE", raising=False)
    assert hardware.profile().device == "cpu"
    assert hardware.profile().model == "smollm2-135m"


def test_the_readme_names_versions_that_the_tests_have():
    section = re.search(r"^## Colab\n(.*?)^## ", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M | re.S)[1]
    named = re.findall(r"(Python|[a-z]+) (\d+(?:\.\d+)+)", section)
    assert {"Python", "torch", "transformers", "peft", "ipywidgets"} <= {name for name, _ in named}
    tested = {("Python", _python(path)) for path in LISTS}
    tested |= {(name, str(version)) for path in LISTS for name, version in _pins(path).items()}
    assert set(named) <= tested
    assert "python .github/set_repository.py https://github.com/OWNER/NAME" in section


def _differences(pins, python):
    """What is installed here and is not what Colab has."""
    different = {} if python == platform.python_version().rpartition(".")[0] else {"Python": platform.python_version()}
    for name, pin in pins.items():
        try:
            found = Version(metadata.version(name))
        except metadata.PackageNotFoundError:
            found = None
        if name == "torchao":
            pin = None  # the setup cell has removed it
        if (found and Version(found.public)) != pin:
            different[name] = found and str(found)
    return different


def test_another_version_is_noticed():
    here = platform.python_version().rpartition(".")[0]
    pins = {name: Version(Version(metadata.version(name)).public) for name in ("torch", "numpy")}
    assert _differences(pins, here) == {}
    assert _differences(pins, "2.7") == {"Python": platform.python_version()}
    assert _differences(pins | {"numpy": Version("1.0")}, here) == {"numpy": metadata.version("numpy")}
    assert _differences(pins | {"no-such-package": Version("1.0")}, here) == {"no-such-package": None}
    assert _differences(pins | {"torchao": Version("0.10.0")}, here) == {}


@pytest.mark.colab
def test_this_is_colab_s_environment():
    """After the setup cell: all that was there is as it was, but for torchao, and what was missing is there."""
    here = platform.python_version().rpartition(".")[0]
    lists = [path for path in LISTS if _python(path) == here]
    assert lists, f"Python {here}: Colab's lists are for {', '.join(map(_python, LISTS))}"
    assert _differences(_pins(lists[0]), here) == {}
    for name in {"lora-lab", *MISSING_THERE}:
        assert metadata.version(name)


OLD_NAME = ADDRESS.removeprefix("https://github.com/")
NEW = "https://github.com/" + "Some-one/my.course_2"  # in two parts, or else this file names the address already


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A copy of what git tracks, in a repository of its own."""
    folder = tmp_path_factory.mktemp("course") / "copy"
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in {".github/set_repository.py", *filter(None, listing.decode().split("\0"))}:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def _files(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and ".git" not in path.relative_to(folder).parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _set_repository(folder, *arguments):
    command = [sys.executable, ".github/set_repository.py", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_the_address_is_set_everywhere_and_back(course):
    before = _files(course)
    run = _set_repository(course, NEW)
    assert (run.returncode, run.stderr) == (0, "")
    after = _files(course)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == set(run.stdout.splitlines()[:-1])
    assert changed >= {"pyproject.toml", "CITATION.cff", *(f"notebooks/{path.name}" for path in NOTEBOOKS)}
    for name, content in after.items():
        text = content.decode(errors="replace")
        assert f"github.com/{OLD_NAME}" not in text, name
        assert f"github/{OLD_NAME}" not in text, name
    for path in NOTEBOOKS:
        cells = _cells(course / "notebooks" / path.name)
        was = _cells(path)
        assert [cell.get("outputs") for cell in cells] == [cell.get("outputs") for cell in was]
        assert [i for i, cell in enumerate(cells) if cell.source != was[i].source] == [0, 1]
    assert _set_repository(course, NEW).stdout == "It is the address already.\n"
    assert _files(course) == after
    assert _set_repository(course, ADDRESS).returncode == 0
    assert _files(course) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "python .github/set_repository.py https://github.com/OWNER/NAME"),
        (("http://github.com/a/b",), "is not https://github.com/OWNER/NAME"),
        (("https://github.com/a",), "is not https://github.com/OWNER/NAME"),
        (("https://github.com/a/b/",), "is not https://github.com/OWNER/NAME"),
        (("https://github.com/a/b/c",), "is not https://github.com/OWNER/NAME"),
        (("https://github.com/a/b.git",), "is not https://github.com/OWNER/NAME"),
        (("https://github.com/a/..",), "is not https://github.com/OWNER/NAME"),
        (("https://github.com/-a/b",), "is not https://github.com/OWNER/NAME"),
        (('https://github.com/a/b";ls',), "is not https://github.com/OWNER/NAME"),
        (("https://github.com/a/b\n",), "is not https://github.com/OWNER/NAME"),
        (("https://gitlab.com/a/b",), "is not https://github.com/OWNER/NAME"),
        (("https://github.com/a/b", "c"), "python .github/set_repository.py"),
        (("https://github.com/huggingface/peft",), "names https://github.com/huggingface/peft already"),
    ],
)
def test_another_address_is_refused_and_nothing_changes(course, arguments, message):
    (course / "docs").mkdir(exist_ok=True)
    (course / "docs" / "note.md").write_text("See https://github.com/huggingface/peft/issues.", encoding="utf-8")
    subprocess.run(["git", "add", "docs/note.md"], cwd=course, check=True)
    before = _files(course)
    run = _set_repository(course, *arguments)
    assert run.returncode == 1
    assert message in run.stderr
    assert _files(course) == before


def test_a_file_that_cannot_be_written_leaves_all_as_it_was(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("set_repository", SET_REPOSITORY)
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    contents = {tmp_path / name: (name.encode(), b"new " + name.encode()) for name in ("a", "b", "c")}
    for path, (old, _) in contents.items():
        path.write_bytes(old)
    write_bytes = Path.write_bytes

    def full_disk(path, data):
        if data == b"new b":
            write_bytes(path, b"ne")
            raise OSError("no space left")
        write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="no space left"):
        command.write(contents)
    assert {path.name: path.read_bytes() for path in contents} == {"a": b"a", "b": b"b", "c": b"c"}


def test_a_longer_name_is_left_alone(tmp_path):
    """The name as the start of another, and names that are no address, stay as they are."""
    (tmp_path / ".github").mkdir()
    shutil.copyfile(SET_REPOSITORY, tmp_path / ".github" / "set_repository.py")
    text = '[project.urls]\nRepository = "https://github.com/a/b"\n# a/b github.com/a/b-c github.com/a/b.io {}\r\n'
    (tmp_path / "pyproject.toml").write_bytes(text.format("colab.research.google.com/github/a/b/blob").encode())
    for arguments in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    assert _set_repository(tmp_path, "https://github.com/x/y").returncode == 0
    changed = text.replace('github.com/a/b"', 'github.com/x/y"').format("colab.research.google.com/github/x/y/blob")
    assert (tmp_path / "pyproject.toml").read_bytes() == changed.encode()
