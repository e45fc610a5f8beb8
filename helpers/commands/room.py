"""A classroom without a network: one folder with the packages, the model, the notebooks and an installer."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from helpers.fetch import FOLDER, fetch_smollm2
from helpers.finetune.folders import atomic_write_text

ROOT = Path(__file__).parents[2]
PROJECT = ("pyproject.toml", "README.md", "LICENSE", "helpers")  # what the package is built from
INSTALLER = Path(__file__).parents[1] / "assets" / "room" / "install.py"
MODULES = "lora-lab[lab]"
README = """LoRA Lab without a network

This folder ({size:.1f} GB) is for {system} with Python {python}, and for systems that are as recent as the one
that it was made on. Copy it to a disk, or share it so that it can be read. Then, on each machine and in this folder:

    {command}

installs the course into lora-lab in the home folder and says how to start it; nothing is downloaded. It may be run
again, and leaves notebooks that are there already as they are. Another folder can be given as an argument.

The model is copied to .cache/lora-lab in the home folder, unless it is in the folder that the environment variable
LORA_LAB_CACHE names. So a class can read it from here: set LORA_LAB_CACHE to the folder `model` beside this file.
"""


def collect_room(target: str | Path, notebooks: str | Path | None = None) -> str:
    """Collect all that a machine without a network needs to run the course.

    The packages have the versions that are installed here, so run the notebooks here first. They fit this system,
    processor and Python version. Work goes on in "<target>.unfinished", which gets its name when it is complete; a
    call that was cut off is taken up again by the next one.

    Args:
        target: the new folder.
        notebooks: the folder of the notebooks to take, such as a hand-out without solutions. Default: the course's.

    Returns:
        A sentence with the folder's size.

    Raises:
        FileExistsError: `target` exists; it is never overwritten.
        FileNotFoundError: there are no notebooks, or this is not a clone of the repository.
        RuntimeError: pip or the download of the model failed.
        OSError: the folder cannot be written, or the disk is full.
    """
    target, notebooks = Path(target).absolute(), Path(notebooks or ROOT / "notebooks")
    if target.exists():
        raise FileExistsError(f"{target} exists already; remove it, or choose another name")
    if not sorted(notebooks.glob("*.ipynb")):
        raise FileNotFoundError(f"there are no notebooks in {notebooks}")
    for name in PROJECT:
        if not (ROOT / name).exists():
            raise FileNotFoundError(f"{ROOT / name} is missing; run this in a clone of the course, installed with -e")
    work = target.with_name(f"{target.name}.unfinished")
    work.mkdir(parents=True, exist_ok=True)
    _collect_wheels(work / "wheels")
    print("Copying the model and the notebooks", file=sys.stderr, flush=True)
    _copy(fetch_smollm2(), work / "model" / FOLDER)
    _copy(notebooks, work / "notebooks", only="*.ipynb")
    shutil.copyfile(INSTALLER, work / INSTALLER.name)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    atomic_write_text(work / "for.txt", f"{python} {platform.system()} {platform.machine()}\n")
    size = sum(file.stat().st_size for file in work.rglob("*")) / 1e9
    text = README.format(
        size=size,
        system=f"{platform.system()} on {platform.machine()}",
        python=python,
        command=f"py -{python} install.py" if os.name == "nt" else f"python{python} install.py",
    )
    atomic_write_text(work / "README.txt", text)
    work.rename(target)
    return f"{target} holds the course for {platform.system()} with Python {python}, {size:.1f} GB: see its README.txt."


def _collect_wheels(wheels: Path) -> None:
    """Fill a folder with wheels of the course and of what it needs, in the versions that are installed here."""
    print(f"Collecting packages in {wheels}", file=sys.stderr, flush=True)
    for wheel in wheels.glob("*.whl"):
        if not zipfile.is_zipfile(wheel):  # half a file, from a call that was killed
            wheel.unlink()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as folder:
        source, constraints = Path(folder, "lora-lab"), Path(folder, "installed.txt")
        for name in PROJECT:  # a copy, since setuptools leaves its build folder beside what it builds
            _copy_of(ROOT / name, source / name)
        listed = subprocess.run(
            [*pip, "list", "--format=freeze", "--exclude=lora-lab"], capture_output=True, check=True
        )
        constraints.write_bytes(listed.stdout)
        _run(
            [*pip, "wheel", "--no-input", "-c", str(constraints), "-w", str(wheels), f"{source}[lab]"],
            "Is there a network? pip's own settings apply (PIP_INDEX_URL, HTTPS_PROXY). Where a version is not found, "
            "such as PyTorch's CPU build, give the address that it was installed from in PIP_EXTRA_INDEX_URL. "
            "Then run the command again; it goes on from here",
        )
    _run(
        [*pip, "install", "-q", "--dry-run", "--ignore-installed", "--no-index", "--find-links", str(wheels), MODULES],
        f"The packages collected are not complete. Remove {wheels} and run the command again",
    )


def _run(command: list[str], remedy: str) -> None:
    run = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, errors="replace")
    if run.returncode != 0:
        said = "\n    ".join(run.stderr.strip().splitlines()[-6:])
        raise RuntimeError(f"`pip {command[4]}` failed (exit code {run.returncode}):\n    {said}\n{remedy}")


def _copy(source: Path, target: Path, only: str = "*") -> None:
    """Copy a folder's files, readable for everyone, so that a class can share them."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.glob(only)):
        shutil.copyfile(file, target / file.name)
        (target / file.name).chmod(0o644)


def _copy_of(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)
