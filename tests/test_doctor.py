"""The environment check and the hardware profile: each failure is provoked, and names its remedy."""

import os
import shutil
import subprocess
import sys
from importlib import metadata

from helpers.__main__ import main
from helpers.commands import doctor as doctor_module
from helpers.commands.doctor import doctor, requirements
from helpers.hardware import profile

import pytest
import torch

CHECKS = ["python", "torch device", "bitsandbytes backend", "adapter", "disk", "model cache", "notebook kernel"]


def _lines(capsys):
    lines = capsys.readouterr().out.splitlines()
    return {line[7:].split(":")[0]: line for line in lines[:-1]}, lines[-1]


def test_every_check_prints_one_line_and_passes(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_LAB_CACHE", str(tmp_path))
    assert main(["doctor"]) == 0
    lines, last = _lines(capsys)
    assert set(lines) == {*CHECKS, *(name for name, _ in requirements())}
    assert all(line.startswith("[OK]   ") for line in lines.values())
    assert last == "All checks passed."
    assert "`python -m helpers fetch`" in lines["model cache"]


def test_the_packages_are_those_that_the_project_declares():
    declared = dict(requirements())
    assert declared["torch"] == ">=2.7"
    assert sorted(declared["transformers"].split(",")) == ["!=5.24.0", ">=5.4"]
    assert declared["pip"] == ""
    assert "pytest" not in declared


def _versions(**fake):
    real = metadata.version

    def version(name):
        if name not in fake:
            return real(name)
        if fake[name] is None:
            raise metadata.PackageNotFoundError(name)
        return fake[name]

    return version


@pytest.mark.parametrize(
    ("provoke", "check", "message"),
    [
        (
            lambda m, p: m.setattr(doctor_module.metadata, "version", _versions(gguf="0.9")),
            "gguf",
            "0.9 does not fit >=",
        ),
        (lambda m, p: m.setattr(doctor_module.metadata, "version", _versions(gguf=None)), "gguf", "not installed;"),
        (lambda m, p: m.setattr(doctor_module.sys, "version_info", (3, 9, 1)), "python", "install Python 3.11"),
        (
            lambda m, p: m.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 10**8)),
            "disk",
            "0.1 GB free for",
        ),
        (lambda m, p: m.setattr(os, "access", lambda path, mode: False), "model cache", "set LORA_LAB_CACHE"),
        (lambda m, p: m.setitem(sys.modules, "ipykernel", None), "notebook kernel", 'pip install -e ".[lab]"'),
        (lambda m, p: m.setitem(sys.modules, "bitsandbytes.functional", None), "bitsandbytes backend", "bitsandbytes"),
    ],
    ids=["old", "missing", "python", "disk", "cache", "kernel", "bitsandbytes"],
)
def test_a_failed_check_names_the_remedy(provoke, check, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_LAB_CACHE", str(tmp_path))
    provoke(monkeypatch, tmp_path)
    assert doctor() == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if line.startswith("[FAIL]")]
    assert len(failed) == 1
    assert failed[0].startswith(f"[FAIL] {check}: ")
    assert message in failed[0]
    assert lines[-1] == f"1 of {len(lines) - 1} checks failed."


def test_a_full_disk_is_no_fault_once_the_model_is_there(capsys, monkeypatch, smollm2):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 10**8))
    doctor()
    assert "[OK]   disk: 0 GB free" in capsys.readouterr().out


def test_a_wrong_round_trip_through_4_bits_is_noticed(capsys, monkeypatch):
    import bitsandbytes.functional as bnb

    monkeypatch.setattr(bnb, "dequantize_4bit", lambda packed, state: torch.zeros(4, 64))
    assert doctor() == 1
    assert "[FAIL] bitsandbytes backend: a 4-bit round trip on" in capsys.readouterr().out


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


class _Gpu:
    def __init__(self, name, major, gib):
        self.name, self.major, self.total_memory = name, major, gib * 2**30


@pytest.mark.parametrize(
    ("gpu", "dtype", "model"),
    [
        (_Gpu("Tesla T4", 7, 14.6), torch.float16, "HuggingFaceTB/SmolLM2-1.7B-Instruct"),
        (_Gpu("NVIDIA A100", 8, 39.6), torch.bfloat16, "HuggingFaceTB/SmolLM2-1.7B-Instruct"),
        (_Gpu("NVIDIA L4", 8, 22.5), torch.bfloat16, "HuggingFaceTB/SmolLM2-1.7B-Instruct"),
        (_Gpu("GeForce GTX 1060", 6, 6), torch.float16, "smollm2-135m"),
    ],
)
def test_the_profile_of_a_gpu(gpu, dtype, model, monkeypatch):
    monkeypatch.delenv("LORA_LAB_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    machine = profile()
    assert (machine.device, machine.name, machine.dtype) == ("cuda", gpu.name, dtype)
    assert machine.model == model
    monkeypatch.setenv("LORA_LAB_DEVICE", "cpu")
    assert (profile().device, profile().dtype) == ("cpu", torch.float32)


def test_the_profile_of_a_machine_without_a_gpu(monkeypatch):
    monkeypatch.setenv("LORA_LAB_DEVICE", "cpu")
    machine = profile()
    assert (machine.device, machine.dtype, machine.model) == ("cpu", torch.float32, "smollm2-135m")
    assert 0.5 < machine.memory_gib < 10_000
    monkeypatch.setenv("LORA_LAB_DEVICE", "tpu")
    with pytest.raises(ValueError, match="LORA_LAB_DEVICE='tpu': set it to cpu"):
        profile()


@pytest.mark.cuda
def test_the_profile_s_settings_work_on_the_gpu():
    machine = profile()
    assert machine.device == "cuda"
    assert (torch.ones(2, device=machine.device, dtype=machine.dtype) + 1).sum().item() == 4
