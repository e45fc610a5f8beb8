"""Renew constraints.txt: `python .github/renew_lock.py [PACKAGE …]`, which needs `uv` and `git`.

In a clone of what is committed, it resolves the newest versions that pyproject.toml allows (of the named packages
alone, if any are named), installs them in a new environment and runs the README's test command. If all is green, it
replaces constraints.txt, the record of the run and the README's table. If not, everything stays as it was; it repeats
what failed with the step of each changed direct dependency alone, and names those that break it.

uv's own settings apply: UV_TORCH_BACKEND=cpu, for one, takes PyTorch's CPU build, which the lock admits as well.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from helpers.finetune.folders import atomic_write_text

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCK, RECORD = "constraints.txt", ".github/results/lock.json"
HEADER = """\
# The versions that the course was tested with, on Linux, macOS and Windows, for `pip install -c constraints.txt`.
# Written by `python .github/renew_lock.py`. pip is left out, since it cannot replace itself on Windows.
"""


def resolve(tree: Path, old: str, packages: list[str]) -> None:
    """Write the lock of a tree: the versions of `old`, but for the named packages, or for all if none is named."""
    (tree / LOCK).write_text(old, encoding="utf-8")  # uv keeps what stands in the file that it writes
    newest = [f"--upgrade-package={name}" for name in packages] or ["--upgrade"]
    command = ["uv", "pip", "compile", "-q", "--universal", "--python-version=3.11", "--all-extras", "--no-header"]
    command += ["--no-annotate", "--no-emit-package=pip", f"--output-file={LOCK}", *newest, "pyproject.toml"]
    subprocess.run(command, cwd=tree, check=True, stdout=subprocess.DEVNULL)
    (tree / LOCK).write_text(HEADER + (tree / LOCK).read_text(encoding="utf-8"), encoding="utf-8")


def pins(lock: str) -> dict[str, set[str]]:
    """Return the versions of each package; it has several where they differ between systems or Pythons."""
    found: dict[str, set[str]] = {}
    for requirement in map(Requirement, (line for line in lock.splitlines() if line and not line.startswith("#"))):
        found.setdefault(canonicalize_name(requirement.name), set()).add(str(requirement.specifier))
    return found


def changes(old: str, new: str) -> dict[str, str]:
    """Return what a new lock changes: {package: "==1.0 -> ==1.1"}."""
    before, after = pins(old), pins(new)
    words = {name: [" ".join(sorted(lock.get(name, {"none"}))) for lock in (before, after)] for name in before | after}
    return {name: " -> ".join(pair) for name, pair in sorted(words.items()) if pair[0] != pair[1]}


def direct(tree: Path) -> set[str]:
    """Return the packages that a tree's pyproject.toml names, in an extra or not."""
    project = tomllib.loads((tree / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return {canonicalize_name(Requirement(line).name) for line in lines}


def run_tests(tree: Path, tests: list[str]) -> list[str]:
    """Install a tree's lock in a new environment, run all tests or the named ones, and return those that failed."""
    (tree / RECORD).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as environment:
        subprocess.run(["uv", "venv", "-q", "--clear", environment], check=True)
        python = str(Path(environment, "Scripts/python.exe" if sys.platform == "win32" else "bin/python"))
        install = ["uv", "pip", "install", "-q", "--python", python, "-c", LOCK, "-e", ".[lab,test]"]
        subprocess.run(install, cwd=tree, check=True)
        subprocess.run([python, "-m", "pytest", "-q", "--slow", "--results", RECORD, *tests], cwd=tree)
    if not (tree / RECORD).exists():
        return ["the run as a whole, which came to no end"]
    return json.loads((tree / RECORD).read_text(encoding="utf-8"))["failed"]


def culprits(tree: Path, old: str, stepped: list[str], failed: list[str]) -> list[str]:
    """Return those of the packages whose step from the old lock, alone, makes one of the failed tests fail."""
    # A cell of a notebook needs those before it.
    tests = sorted({name.split("::")[0] if ".ipynb::" in name else name for name in failed if "::" in name})
    broke = []
    for name in stepped:
        resolve(tree, old, [name])
        if run_tests(tree, tests):
            broke.append(name)
    return broke


def main(packages: list[str]) -> int:
    """Renew the lock. Return 0 if it is renewed or had the newest versions already, 1 if tests fail with those."""
    old = (ROOT / LOCK).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "lora-lab")
        subprocess.run(["git", "clone", "-q", str(ROOT), str(tree)], check=True)
        resolve(tree, old, packages)
        new = (tree / LOCK).read_text(encoding="utf-8")
        changed = changes(old, new)
        if not changed:
            print(f"{LOCK} has the newest versions already.")
            return 0
        print(*(f"{name}: {step}" for name, step in changed.items()), sep="\n", flush=True)
        if failed := run_tests(tree, []):
            stepped = sorted(changed.keys() & direct(tree))
            print(f"{len(failed)} failed; {LOCK} stays as it was. Which step breaks them?", flush=True)
            broke = culprits(tree, old, stepped, failed)
            print(f"Broken by the step of {', '.join(broke) or 'none of these alone: ' + ', '.join(stepped)}.")
            return 1
        record = (tree / RECORD).read_text(encoding="utf-8")
    atomic_write_text(ROOT / LOCK, new)
    atomic_write_text(ROOT / RECORD, record)
    subprocess.run([sys.executable, ".github/results.py"], cwd=ROOT, check=True)
    print(f"{LOCK}, {RECORD} and README.md are renewed.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
