"""`python -m helpers doctor`: one line per check, [OK] or [FAIL] with the remedy."""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

PYTHON = (3, 11)
FREE_GB = 2.0  # the model cache takes 0.6 GB, and twice that while it is being made


class Problem(Exception):
    """A failed check; its text says what is wrong and what to do."""


def doctor(only_failures: bool = False) -> int:
    """Print one line per check of this machine, or only the failed ones, and return 0 if all passed, 1 otherwise."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("python", _python),
        *((name, lambda name=name, needs=needs: _package(name, needs)) for name, needs in requirements()),
        ("torch device", _device),
        ("bitsandbytes backend", _bitsandbytes),
        ("adapter", _adapter),
        ("disk", _disk),
        ("model cache", _cache),
        ("notebook kernel", _kernel),
    ]
    failures = 0
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            for name, check in checks:
                try:
                    passed = check()
                    if not only_failures:
                        print(f"[OK]   {name}: {passed}")
                except Exception as error:
                    failures += 1
                    reason = str(error) if isinstance(error, Problem) else f"{type(error).__name__}: {error}"
                    print(f"[FAIL] {name}: {' '.join(reason.split())}")
    finally:
        logging.disable(logging.NOTSET)
    print("All checks passed." if not failures else f"{failures} of {len(checks)} checks failed.")
    return 1 if failures else 0


def requirements() -> list[tuple[str, str]]:
    """Return the (package, specifier) pairs that lora-lab's metadata declares, such as ("torch", ">=2.7")."""
    pairs = []
    for line in metadata.requires("lora-lab") or []:
        requirement, _, marker = line.partition(";")
        if "extra" not in marker:
            name, specifier = re.fullmatch(r"([\w.-]+)(.*)", requirement.strip()).groups()  # type: ignore[union-attr]
            pairs.append((name, specifier.strip()))
    return pairs


def _python() -> str:
    found = platform.python_version()
    if sys.version_info[:2] < PYTHON:
        raise Problem(f"{found} is too old; install Python {PYTHON[0]}.{PYTHON[1]} or newer")
    return f"{found} on {platform.system()} {platform.machine()}"


def _package(name: str, specifier: str) -> str:
    from packaging.specifiers import SpecifierSet

    remedy = f'`{_pip()} "{name}{specifier}"`'
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        raise Problem(f"not installed; {remedy}") from None
    if not SpecifierSet(specifier).contains(found, prereleases=True):
        raise Problem(f"{found} does not fit {specifier}; {remedy}")
    return found + (f" (needs {specifier})" if specifier else "")


def _pip() -> str:
    return f"{Path(sys.executable).name} -m pip install"


def _device() -> str:
    from helpers.hardware import profile

    import torch

    machine = profile()
    a = torch.randn(64, 64, device=machine.device, dtype=machine.dtype)
    if not torch.isfinite(a @ a).all():
        raise Problem(f"a matrix product on {machine.device} gave non-finite numbers; update the GPU driver and torch")
    driver = shutil.which("nvidia-smi")
    if machine.device == "cpu" and driver:
        raise Problem(
            "nvidia-smi is here, but torch sees no GPU: torch is a CPU build, or the driver is too old. "
            "See pytorch.org/get-started for the install command"
        )
    return f"{machine}, adapters in float32"


def _bitsandbytes() -> str:
    from helpers.hardware import profile

    import bitsandbytes.functional as bnb
    import torch

    device = profile().device
    weight = torch.linspace(-1, 1, 256, device=device).view(4, 64)
    try:
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4")
        error = (bnb.dequantize_4bit(packed, state) - weight).abs().max().item()
    except Exception as cause:
        raise Problem(
            f"4-bit quantization fails on {device} ({type(cause).__name__}: {cause}); the QLoRA notebooks need it. "
            "Run `python -m bitsandbytes` for details"
        ) from cause
    if error > 0.2:
        raise Problem(f"a 4-bit round trip on {device} is off by {error:.2f}; re-install bitsandbytes")
    return f"NF4 works on {device}"


def _adapter() -> str:
    """Add an adapter for real, by both ways that the course uses.

    PEFT 0.20 raises here when a torchao older than it wants is installed, and transformers 5.24.0 with PEFT below 0.22.
    """
    from helpers.models import load_base

    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"])
    for add in (get_peft_model, lambda model, config: model.add_adapter(config) or model):
        try:
            model = add(load_base("tiny", device="cpu"), config)
        except Exception as error:
            raise Problem(_remedy_for_the_pair(error)) from error
        trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if trains != 8192:  # 4 layers x (A of 8 x 128 + B of 128 x 8)
            raise Problem(f"{trains:,} parameters of tiny train, and an adapter of rank 8 on q_proj has 8,192")
    return f"get_peft_model and add_adapter attach one to the tiny model ({trains:,} parameters train)"


def _remedy_for_the_pair(error: Exception) -> str:
    if "torchao" in str(error):
        return f"{error} Remedy: `pip uninstall -y torchao`, or `pip install -U torchao`"
    transformers, peft = metadata.version("transformers"), metadata.version("peft")
    lock = Path(__file__).parents[2] / "constraints.txt"  # in a clone: the versions that were tested
    wanted = f'-c "{lock}" transformers peft' if lock.exists() else f'"transformers<{transformers}" "peft>={peft}"'
    return (
        f"transformers {transformers} and peft {peft} do not work together, {type(error).__name__}: {error} "
        f"Remedy: `{_pip()} {wanted}`"
    )


def _disk() -> str:
    from helpers.fetch import cache_dir, is_cached

    folder = cache_dir()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 1e9
    if free < FREE_GB and not is_cached():
        raise Problem(f"{free:.1f} GB free for {cache_dir()}; free {FREE_GB:.0f} GB, or set LORA_LAB_CACHE elsewhere")
    return f"{free:.0f} GB free for the model cache"


def _cache() -> str:
    from helpers.fetch import cache_dir, is_cached

    if is_cached():
        return f"smollm2-135m is in {cache_dir()}"
    folder = cache_dir()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        raise Problem(f"cannot write to {folder}; set LORA_LAB_CACHE to a folder that you can write to")
    return f"smollm2-135m is not yet in {cache_dir()}; the first use fetches it, or `python -m helpers fetch`"


def _kernel() -> str:
    """Whether notebooks opened in Jupyter run in this environment."""
    try:
        import ipykernel
        from jupyter_client.kernelspec import KernelSpecManager

        program = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except Exception as error:
        raise Problem('no Python kernel for notebooks; `pip install -e ".[lab]"`') from error
    # Jupyter replaces a bare "python" by the interpreter that it runs in itself.
    if Path(program).is_absolute() and Path(program).parent != Path(sys.executable).parent:
        raise Problem(
            f"the kernel 'python3' runs {program}, not {sys.executable}; "
            "`python -m ipykernel install --sys-prefix` in this environment"
        )
    return f"ipykernel {ipykernel.__version__} in this environment"
