"""A class: the README's plans, the count of exercises, a room without a network, many students on one machine."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from helpers import fetch
from helpers.__main__ import main
from helpers.checks import base, progress
from helpers.checks import lora as checks
from helpers.commands import room

import nbformat
import psutil
import pytest
from exercises import exercise_functions

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PLANS = re.findall(r"^\*\*([^*]+)\*\*\n\n\| from \| .*\n\|[-|]+\|\n((?:\|.*\n)+)", README, flags=re.M)


def _minutes(notebook):
    """Return the minutes to read, to run and for the exercises, as the notebook gives them."""
    cells = [cell.source for cell in nbformat.read(ROOT / notebook, as_version=4).cells if cell.cell_type == "markdown"]
    read, run = re.search(r"\*\*Time:\*\* (\d+) minutes to read, (\d+) minutes? to run", cells[0]).groups()
    found = re.findall(r"ifficulty \d(?: of 3)?, (\d+) minutes", "\n".join(cells))
    assert len(found) == "\n".join(cells).count("\n### Exercise"), f"{notebook}: an exercise without its minutes"
    return [int(read), int(run), sum(map(int, found))]


@pytest.mark.parametrize("table", [table for _, table in PLANS], ids=[name for name, _ in PLANS])
def test_a_plan_adds_up(table):
    """Notebooks with their own minutes, in their order; each line begins when the one before it is over."""
    now, seen = None, []
    for line in table.splitlines():
        start, what, minutes, parts = (cell.strip() for cell in line.strip("|").split("|"))
        hours, past = map(int, start.split(":"))
        assert now in (None, 60 * hours + past), line
        now = None if what.startswith("End") else 60 * hours + past + int(minutes)
        if link := re.fullmatch(r"\[(\d\d) .+\]\((notebooks/\1_\w+\.ipynb)\)", what):
            found = _minutes(link[2])
            assert (minutes, parts) == (str(sum(found)), " + ".join(map(str, found))), line
            seen.append(link[1])
    assert now is None, "the last line is the end"
    assert seen == sorted(set(seen))


# The count of exercises

STUBS, SOLUTIONS = exercise_functions("01_lora_math")


@pytest.fixture
def line(monkeypatch, capsys):
    """The line that `progress` prints in a fresh kernel, after what is checked."""
    monkeypatch.setattr(base, "_results", {})

    def print_it():
        capsys.readouterr()
        progress(checks)
        return capsys.readouterr().out

    return print_it


def test_progress_counts_the_last_result_of_each_check(line):
    for name in ("merge", "lora_forward", "best_rank_r"):
        getattr(checks, name)(STUBS[name])
    stubs = "Not written: merge, lora_forward, best_rank_r. Check not run: parameter_count."
    assert line() == f"Exercises: 0 of 4 correct. {stubs}\n"
    checks.merge(lambda *arguments: SOLUTIONS["merge"](*arguments))  # whatever its name
    checks.lora_forward(lambda x, W_0, A, B, alpha: x @ W_0.T)
    checks.best_rank_r(lambda delta_w, r: 1 / 0)
    wrong = "Wrong: lora_forward, best_rank_r. Check not run: parameter_count."
    assert line() == line() == f"Exercises: 1 of 4 correct. {wrong}\n"
    checks.merge(lambda W_0, A, B, alpha: W_0)
    assert line().startswith("Exercises: 0 of 4 correct. Wrong: merge, lora_forward, best_rank_r.")
    for name, solution in SOLUTIONS.items():
        getattr(checks, name)(solution)
    assert line() == "Exercises: 4 of 4 correct.\n"


def test_an_interrupted_check_is_not_correct(line):
    def endless(*arguments):
        raise KeyboardInterrupt

    checks.merge(SOLUTIONS["merge"])
    with pytest.raises(KeyboardInterrupt):
        checks.merge(endless)
    assert "Wrong: merge." in line()


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_each_checks_module_lists_its_notebooks_exercises(path, monkeypatch, capsys):
    monkeypatch.setattr(base, "_results", {})
    cells = nbformat.read(path, as_version=4).cells
    found = [re.match(r"checks\.(\w+)\(", c.source)[1] for c in cells if "check" in c.metadata.get("tags", [])]
    imported = re.search(r"from helpers\.checks import (\w+) as checks", "\n".join(cell.source for cell in cells))
    assert bool(found) == bool(imported)
    if imported:
        progress(importlib.import_module(f"helpers.checks.{imported[1]}"))
        line = re.fullmatch(r"Exercises: 0 of (\d+) correct\. Check not run: (.*)\.\n", capsys.readouterr().out)
        assert int(line[1]) == len(found)
        assert set(line[2].split(", ")) == set(found)


# A room without a network


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Collecting without the packages and the real model; `pip` is what it was asked to do."""
    model, notebooks, pip = tmp_path / "cache" / fetch.FOLDER, tmp_path / "hand_out", []
    model.mkdir(parents=True)
    notebooks.mkdir()
    (model / "model.safetensors").write_bytes(b"weights" * 1_000_000)
    (model / "model.safetensors").chmod(0o600)
    (notebooks / "00_start_here.ipynb").write_text("{}")
    (notebooks / "notes.txt").write_text("not a notebook")

    def run(command, remedy):
        pip.append(command)
        if command[4] == "wheel":
            wheels = Path(command[command.index("-w") + 1])
            assert not list(wheels.glob("half-*")), "a damaged wheel is not taken for a finished one"
            wheels.mkdir(exist_ok=True)
            (wheels / "whole-1-py3-none-any.whl").write_bytes(b"PK\x05\x06" + bytes(18))

    monkeypatch.setattr(room, "_run", run)
    monkeypatch.setattr(room, "fetch_smollm2", lambda: model)
    return notebooks, pip


def test_a_room_is_whole(small, tmp_path, capsys):
    (notebooks, pip), folder = small, tmp_path / "room"
    assert main(["room", str(folder), "--notebooks", str(notebooks)]) == 0
    assert "GB: see its README.txt" in capsys.readouterr().out
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    weights = files.pop("model/smollm2-135m/model.safetensors")
    assert weights.stat().st_mode & 0o444 == 0o444, "another user can read it"
    wheel, notebook = "wheels/whole-1-py3-none-any.whl", "notebooks/00_start_here.ipynb"
    assert files.keys() == {"README.txt", "for.txt", "install.py", wheel, notebook}
    assert not list(tmp_path.glob("*.unfinished"))
    assert [command[4] for command in pip] == ["wheel", "install"]
    assert "--no-index" in pip[1]
    assert main(["room", str(folder)]) == 1
    assert "exists already" in capsys.readouterr().err


@pytest.mark.slow
def test_a_room_that_was_cut_off_goes_on(small, tmp_path, monkeypatch):
    def cut_off():
        raise RuntimeError("no network")

    notebooks, _ = small
    with monkeypatch.context() as patch:
        patch.setattr(room, "fetch_smollm2", cut_off)
        with pytest.raises(RuntimeError, match="no network"):
            room.collect_room(tmp_path / "room", notebooks)
    assert not (tmp_path / "room").exists()
    wheels = tmp_path / "room.unfinished" / "wheels"
    assert [wheel.name for wheel in wheels.iterdir()] == ["whole-1-py3-none-any.whl"]
    shutil.copy(wheels / "whole-1-py3-none-any.whl", wheels / "large-1-py3-none-any.whl")
    (wheels / "half-1-py3-none-any.whl").write_bytes(b"PK\x03\x04 and no end")
    room.collect_room(tmp_path / "room", notebooks)
    assert (tmp_path / "room" / "wheels" / "large-1-py3-none-any.whl").exists(), "what was there is kept"


def test_a_room_without_notebooks_is_refused_before_anything_is_made(small, tmp_path, capsys):
    assert main(["room", str(tmp_path / "room"), "--notebooks", str(tmp_path / "nowhere")]) == 1
    assert f"no notebooks in {tmp_path / 'nowhere'}" in capsys.readouterr().err
    assert not list(tmp_path.glob("room*"))


@pytest.mark.slow
def test_a_failure_of_pip_names_the_remedy():
    command = [sys.executable, "-m", "pip", "download", "--no-index", "nothing-like-it==1"]
    with pytest.raises(RuntimeError, match=r"failed \(exit code 1\):[\s\S]*nothing-like-it[\s\S]*Do this"):
        room._run(command, "Do this")


def test_the_installer_refuses_another_python(tmp_path):
    installer = Path(shutil.copy(room.INSTALLER, tmp_path))
    (tmp_path / "for.txt").write_text("3.2 Linux vax\n")
    run = subprocess.run([sys.executable, installer, tmp_path / "home"], capture_output=True, text=True)
    assert run.returncode == 1
    assert "need Python 3.2 for Linux on vax; this is Python 3." in run.stderr
    assert not (tmp_path / "home").exists()


def _without_network():
    """Return the words before a command that cut off its network, or skip the test."""
    script = 'ip link set lo up && exec "$@"'  # Jupyter talks to its kernels through the loopback
    words = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", script, "sh"]
    if not shutil.which("unshare") or not shutil.which("ip"):
        pytest.skip("cannot cut off the network here: unshare and ip are Linux's")
    probe = "import socket; print([name for _, name in socket.if_nameindex()])"
    run = subprocess.run([*words, sys.executable, "-c", probe], capture_output=True, text=True)
    if run.returncode != 0:
        pytest.skip(f"cannot cut off the network here: {run.stderr}")
    assert run.stdout == "['lo']\n"
    return words


def _printed(notebook):
    cells = nbformat.read(notebook, as_version=4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


@pytest.mark.offline
def test_a_room_installs_and_runs_where_there_is_no_network(tmp_path, smollm2, capsys):
    cut_off, times = _without_network(), {}

    def run(what, command, **options):
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, **options)
        times[what] = f"{time.perf_counter() - start:.0f} s"
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    folder, home = tmp_path / "room", tmp_path / "home"
    home.mkdir()
    run("collect", [sys.executable, "-m", "helpers", "room", folder], cwd=ROOT)
    # A student's machine has none of this machine's settings: only where its programs are, and how many threads.
    environment = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ}
    environment |= {"HOME": str(home), "LANG": "C.UTF-8"}
    lines = (folder / "README.txt").read_text(encoding="utf-8").splitlines()
    (command,) = (line.split() for line in lines if line.startswith("    "))
    said = run("install", [*cut_off, *command], cwd=folder, env=environment)
    assert "All checks passed." in said
    jupyter, lab, path = said.splitlines()[-1].split()[:3]
    notebook = Path(path)
    assert lab == "lab"
    assert notebook.is_relative_to(home)
    execute = [jupyter, "nbconvert", "--to", "notebook", "--execute", "--inplace", notebook]
    run("notebook 00", [*cut_off, *execute], cwd=notebook.parent, env=environment)
    assert "exact match after: 64 of 64" in (printed := _printed(notebook))
    run("install again", [*cut_off, *command], cwd=folder, env=environment)
    assert _printed(notebook) == printed, "a second run leaves a student's notebook as it is"
    sizes = {path: sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / 1e9 for path in (folder, home)}
    with capsys.disabled():
        print("\n", {path.name: f"{size:.2f} GB" for path, size in sizes.items()}, times)
    if "+cpu" in metadata.version("torch"):
        stated = _stated(r"the folder takes ([\d.]+) GB, and what the installer makes of it ([\d.]+) GB")
        assert list(sizes.values()) == pytest.approx(stated, rel=0.15)


def _stated(sentence):
    """Return the numbers that a sentence of the README states."""
    return [float(number) for number in re.search(sentence, README).groups()]


# Many students on one machine

TRAIN = """
import resource
from helpers import data, models, training
from peft import LoraConfig, get_peft_model
from transformers import set_seed
model, tokenizer = models.load_base("smollm2-135m"), models.load_tokenizer("smollm2-135m")
set_seed(0)
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
rows = data.encode(data.load_commands("train"), tokenizer)
arguments = training.training_arguments("outputs", max_steps=5, per_device_train_batch_size=8, learning_rate=1e-3)
seconds = training.build_trainer(model, arguments, tokenizer, rows).train().metrics["train_runtime"] / 5
print("peak, GB, and seconds a step:", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, seconds)
input()  # until it is measured from outside
"""


def _unprivileged():
    """Return the words before a command that have it obey the permissions of files, for root too."""
    if os.geteuid() != 0:
        return []
    if not shutil.which("setpriv"):
        pytest.skip("root may write everywhere, and setpriv is not there")
    return ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]


@pytest.fixture
def read_only():
    """A function that takes the right to write from a folder, until the test is over."""
    changed = []

    def take(folder):
        for path in [*folder.rglob("*"), folder]:
            path.chmod(0o555 if path.is_dir() else 0o444)
            changed.append(path)

    yield take
    for path in changed:
        path.chmod(0o755)


@pytest.mark.skipif(os.name == "nt", reason="needs file permissions as POSIX has them")
def test_a_cache_that_is_read_only_is_used(tmp_path, read_only):
    cache = tmp_path / "cache"
    (cache / fetch.FOLDER).mkdir(parents=True)
    (cache / fetch.FOLDER / "model.safetensors").write_bytes(b"weights")
    fetch._seal(cache / fetch.FOLDER)
    read_only(cache)
    before = [(path, path.stat().st_mtime_ns) for path in sorted(cache.rglob("*"))]
    words = [*_unprivileged(), sys.executable, "-c"]
    environment = os.environ | {"LORA_LAB_CACHE": str(cache)}
    run = subprocess.run([*words, f"open({str(cache / 'x')!r}, 'w')"], capture_output=True, text=True)
    assert "PermissionError" in run.stderr
    code = "from helpers.fetch import fetch_smollm2; print(fetch_smollm2())"
    run = subprocess.run([*words, code], env=environment, capture_output=True, text=True)
    assert run.stdout == f"{cache / fetch.FOLDER}\n", run.stderr
    assert [(path, path.stat().st_mtime_ns) for path in sorted(cache.rglob("*"))] == before


@pytest.mark.offline
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads Linux's /proc")
def test_students_share_the_model_in_memory(tmp_path, smollm2, read_only, capsys):
    """One, and then three, who train side by side, from a cache that they cannot write to."""
    shutil.copytree(smollm2, tmp_path / "cache" / fetch.FOLDER)
    read_only(tmp_path / "cache")
    environment = os.environ | {"LORA_LAB_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command, pipes = [*_unprivileged(), sys.executable, "-c", TRAIN], {"stdin": subprocess.PIPE, "text": True}
    options = {"cwd": tmp_path, "env": environment, "stdout": subprocess.PIPE, **pipes}
    rows = []
    for students in (1, 3):
        kernels = [subprocess.Popen(command, **options) for _ in range(students)]
        try:
            said = [next(line for line in kernel.stdout if line.startswith("peak")).split() for kernel in kernels]
            maps = [psutil.Process(kernel.pid).memory_maps() for kernel in kernels]
        finally:
            for kernel in kernels:
                kernel.kill()
                kernel.communicate()
        models = [one for found in maps for one in found if one.path.endswith("model.safetensors")]
        assert len(models) == students
        assert min(one.rss for one in models) > 0.4e9, "the weights are mapped from the file, not copied"
        shared = [sum(one.shared_clean for one in found) / 1e9 for found in maps]
        if students > 1:
            assert min(one.shared_clean for one in models) > 0.4e9, "all have the same copy in memory"
        peak, seconds = (max(float(words[i]) for words in said) for i in (-2, -1))
        rows.append({"students": students, "peak, GB": peak, "of it shared": min(shared), "seconds a step": seconds})
    with capsys.disabled():
        print("\n", *rows, sep="\n")
    first, more, class_size, all_of_them = _stated(
        r"student takes up to ([\d.]+) GB and each further one up to ([\d.]+) GB; so (\d+) students need about (\d+) GB"
    )
    assert all_of_them == round(first + (class_size - 1) * more)
    # The peak of a process counts what it shares with others, which the second student has for nothing.
    found = [rows[0]["peak, GB"], rows[1]["peak, GB"] - rows[1]["of it shared"]]
    assert found == pytest.approx([first, more], rel=0.25)
