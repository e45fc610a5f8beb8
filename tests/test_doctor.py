"""The environment check and the hardware profile: each failure is provoked, and names its remedy."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

from helpers.__main__ import main
from helpers.commands import doctor as doctor_module
from helpers.commands.doctor import doctor, requirements
from helpers.hardware import profile

import pytest
import torch
from packaging.requirements import Requirement

CHECKS = ["python", "torch device", "bitsandbytes backend", "adapter", "disk", "model cache", "notebook kernel"]


def test_every_check_prints_one_line_and_passes(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_LAB_CACHE", str(tmp_path))
    assert main(["doctor"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert all(line.startswith("[OK]   ") for line in lines)
    assert {line[7:].split(":")[0] for line in lines} == {*CHECKS, *(name for name, _ in requirements())}
    assert last == "All checks passed."
    assert "`python -m helpers fetch`" in next(line for line in lines if "model cache:" in line)


def test_the_packages_are_those_that_the_project_declares():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {name for name, _ in requirements()} == {Requirement(line).name for line in project["dependencies"]}


def _version_of_gguf(found):
    """metadata.version, with another answer for gguf."""
    real = metadata.version

    def version(name):
        if name == "gguf" and found is None:
            raise metadata.PackageNotFoundError(name)
        return found if name == "gguf" else real(name)

    return lambda m: m.setattr(doctor_module.metadata, "version", version)


def _full_disk(m):
    m.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 10**8))


# How each check is made to fail, and what its line then says.
FAULTS = {
    "old": (_version_of_gguf("0.9"), "gguf", "0.9 does not fit >="),
    "missing": (_version_of_gguf(None), "gguf", "not installed;"),
    "python": (lambda m: m.setattr(doctor_module.sys, "version_info", (3, 9, 1)), "python", "install Python 3.11"),
    "disk": (_full_disk, "disk", "0.1 GB free for"),
    "cache": (lambda m: m.setattr(os, "access", lambda path, mode: False), "model cache", "set LORA_LAB_CACHE"),
    "kernel": (lambda m: m.setitem(sys.modules, "ipykernel", None), "notebook kernel", 'pip install -e ".[lab]"'),
    "no bitsandbytes": (
        lambda m: m.setitem(sys.modules, "bitsandbytes.functional", None), "bitsandbytes backend", "bitsandbytes",
    ),
    "wrong in 4 bits": (
        lambda m: m.setattr("bitsandbytes.functional.dequantize_4bit", lambda packed, state: torch.zeros(4, 64)),
        "bitsandbytes backend", "a 4-bit round trip on",
    ),
    "adapter": (
        lambda m: m.setattr("peft.get_peft_model", lambda model, config: model),
        "adapter", "951,424 parameters of tiny train",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("provoke", "check", "message"), FAULTS.values(), ids=FAULTS)
def test_a_failed_check_names_the_remedy(provoke, check, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_LAB_CACHE", str(tmp_path))
    provoke(monkeypatch)
    assert doctor(only_failures=True) == 1
    failed, last = capsys.readouterr().out.splitlines()
    assert failed.startswith(f"[FAIL] {check}: ")
    assert message in failed
    assert re.fullmatch(r"1 of \d+ checks failed\.", last)


def test_a_full_disk_is_no_fault_once_the_model_is_there(capsys, monkeypatch, smollm2):
    _full_disk(monkeypatch)
    doctor()
    assert "[OK]   disk: 0 GB free" in capsys.readouterr().out


@pytest.mark.slow
def test_a_torchao_that_breaks_peft_is_noticed(tmp_path):
    """PEFT raises when an older torchao than it supports is installed, as on Colab in 2026."""
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").write_text("")
    (tmp_path / "torchao-0.10.0.dist-info").mkdir()
    (tmp_path / "torchao-0.10.0.dist-info" / "METADATA").write_text("Name: torchao\nVersion: 0.10.0\n")
    (tmp_path / "torchao-0.10.0.dist-info" / "top_level.txt").write_text("torchao\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "LORA_LAB_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "helpers", "doctor"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    [failed] = [line for line in run.stdout.splitlines() if line.startswith("[FAIL]")]
    assert failed.startswith("[FAIL] adapter: ")
    assert "pip uninstall -y torchao" in failed


@pytest.mark.parametrize("clone", [True, False])
def test_two_packages_that_do_not_work_together_are_named_with_the_remedy(clone, capsys, monkeypatch):
    """As transformers 5.24.0 does with PEFT 0.21.2: add_adapter refuses it, get_peft_model does not."""

    def refuse(self, config):
        raise ValueError("The version of PEFT you are using is not compatible, please use a version >= 99")

    monkeypatch.setattr("transformers.PreTrainedModel.add_adapter", refuse)
    if not clone:
        monkeypatch.setattr(doctor_module, "__file__", "/site-packages/helpers/commands/doctor.py")
    assert doctor(only_failures=True) == 1
    [failed, _] = capsys.readouterr().out.splitlines()
    pair = f"transformers {metadata.version('transformers')} and peft {metadata.version('peft')}"
    assert failed.startswith(f"[FAIL] adapter: {pair} do not work together, ValueError: The version of PEFT")
    remedy = 'constraints.txt" transformers peft`' if clone else f'"transformers<{metadata.version("transformers")}"'
    assert remedy in failed


def test_an_adapter_that_trains_something_else_is_noticed(capsys, monkeypatch):
    monkeypatch.setattr("peft.get_peft_model", lambda model, config: model)
    assert doctor(only_failures=True) == 1
    assert "[FAIL] adapter: 951,424 parameters of tiny train" in capsys.readouterr().out


def test_fetch_says_where_the_model_is_or_what_went_wrong(capsys, tmp_path, monkeypatch):
    from helpers import fetch

    monkeypatch.setattr(fetch, "fetch_smollm2", lambda: tmp_path)
    assert main(["fetch"]) == 0
    assert capsys.readouterr().out == f"SmolLM2-135M-Instruct is in {tmp_path}\n"

    def fail():
        raise RuntimeError("no network")

    monkeypatch.setattr(fetch, "fetch_smollm2", fail)
    assert main(["fetch"]) == 1
    assert capsys.readouterr().err == "error: no network\n"


LARGE = "HuggingFaceTB/SmolLM2-1.7B-Instruct"


@pytest.mark.parametrize(
    ("gpu", "major", "gib", "dtype", "model"),
    [
        ("Tesla T4", 7, 14.6, torch.float16, LARGE),
        ("NVIDIA A100", 8, 39.6, torch.bfloat16, LARGE),
        ("NVIDIA L4", 8, 22.5, torch.bfloat16, LARGE),
        ("GeForce GTX 1060", 6, 6, torch.float16, "smollm2-135m"),
    ],
)
def test_the_profile_of_a_gpu(gpu, major, gib, dtype, model, monkeypatch):
    properties = SimpleNamespace(name=gpu, major=major, total_memory=gib * 2**30)
    monkeypatch.delenv("LORA_LAB_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    machine = profile()
    assert (machine.device, machine.name, machine.dtype, machine.model) == ("cuda", gpu, dtype, model)
    monkeypatch.setenv("LORA_LAB_DEVICE", "cpu")
    assert (profile().device, profile().dtype) == ("cpu", torch.float32)


@pytest.mark.parametrize("forced", ["", "cpu"])
def test_the_profile_of_a_machine_without_a_gpu(forced, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(forced))
    monkeypatch.setenv("LORA_LAB_DEVICE", forced)
    machine = profile()
    assert (machine.device, machine.dtype, machine.model) == ("cpu", torch.float32, "smollm2-135m")
    assert 0.5 < machine.memory_gib < 10_000


def test_another_device_is_refused(monkeypatch):
    monkeypatch.setenv("LORA_LAB_DEVICE", "tpu")
    with pytest.raises(ValueError, match="LORA_LAB_DEVICE='tpu': set it to cpu"):
        profile()


@pytest.mark.cuda
def test_the_profile_s_settings_work_on_the_gpu():
    machine = profile()
    assert machine.device == "cuda"
    assert (torch.ones(2, device=machine.device, dtype=machine.dtype) + 1).sum().item() == 4
