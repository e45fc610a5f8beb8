"""Install LoRA Lab from this folder, without a network: `python install.py [FOLDER]`."""

import os
import platform
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOM = Path(__file__).resolve().parent
MODEL = "smollm2-135m"
BYTES_NEEDED = 3_000_000_000


def main() -> None:
    """Make an environment, fill it from the wheels, copy the model and the notebooks, and check the result."""
    made_for = (ROOM / "for.txt").read_text(encoding="utf-8").split()
    here = [f"{sys.version_info.major}.{sys.version_info.minor}", platform.system(), platform.machine()]
    if here != made_for:
        text = "Python {} for {} on {}"
        sys.exit(f"The packages in this folder need {text.format(*made_for)}; this is {text.format(*here)}.")
    home = Path(sys.argv[1] if len(sys.argv) > 1 else Path.home() / "lora-lab").absolute()
    environment, notebooks = home / "environment", home / "notebooks"
    notebooks.mkdir(parents=True, exist_ok=True)
    programs = environment / ("Scripts" if os.name == "nt" else "bin")
    python = programs / ("python.exe" if os.name == "nt" else "python")
    if not python.exists():
        free = shutil.disk_usage(home).free
        if free < BYTES_NEEDED:
            sys.exit(f"{home} needs {BYTES_NEEDED / 1e9:.0f} GB, and {free / 1e9:.1f} GB are free there.")
        print(f"Making {environment}", flush=True)
        venv.create(environment)
    print("Installing the packages (some minutes)", flush=True)
    # pip runs from its wheel, since not every Python can install it; and without its settings, so that no index counts.
    pip = [str(python), str(next((ROOM / "wheels").glob("pip-*.whl")) / "pip"), "--isolated", "install", "-q"]
    options = ["--no-index", "--find-links", str(ROOM / "wheels"), "--disable-pip-version-check"]
    settings = os.environ | {"PIP_CONFIG_FILE": os.devnull}
    run([*pip, *options, "lora-lab[lab]"], settings)
    cache = Path(os.environ.get("LORA_LAB_CACHE") or Path.home() / ".cache" / "lora-lab").expanduser()
    if not (cache / MODEL).exists():
        print(f"Copying the model to {cache}", flush=True)
        partial = cache / f"partial-{os.getpid()}"
        shutil.copytree(ROOM / "model" / MODEL, partial)
        partial.rename(cache / MODEL)
    for file in sorted((ROOM / "notebooks").glob("*.ipynb")):
        if not (notebooks / file.name).exists():  # what a student has written stays
            shutil.copyfile(file, notebooks / file.name)
    run([str(python), "-m", "helpers", "fetch"])  # compares the hashes of the model's files
    run([str(python), "-m", "helpers", "doctor"])
    start = subprocess.list2cmdline([str(programs / "jupyter"), "lab", str(notebooks / "00_start_here.ipynb")])
    print(f"\nReady. Start with\n    {start}")


def run(command: list[str], environment: dict[str, str] | None = None) -> None:
    """Run a command, and stop where it fails; it has said why."""
    code = subprocess.run(command, env=environment).returncode
    if code != 0:
        sys.exit(code)


if __name__ == "__main__":
    main()
