"""What this machine can do, and the settings that follow from it."""

from __future__ import annotations

import contextlib
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch


@dataclass(frozen=True)
class Profile:
    """The machine, and the settings that the notebooks take from it.

    `dtype` is float32 on a CPU and MPS, bfloat16 on CUDA from Ampere (8.0) on, float16 on older GPUs such as the T4.
    """

    device: str  # "cuda", "mps" or "cpu"
    name: str  # the device in words, for people
    memory_gib: float  # of the GPU, or of the machine where there is no GPU
    dtype: torch.dtype  # of the frozen base model, and what 4-bit layers multiply in
    model: str  # the default base model, a name for `helpers.models.load_base`

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}, {self.memory_gib:.0f} GiB: base model {self.model} in {dtype}"


def profile() -> Profile:
    """Look at the hardware and choose device, dtype and the default model.

    On a machine with several GPUs the current CUDA device counts. The environment variable LORA_LAB_DEVICE=cpu leaves a
    GPU unused.
    """
    forced = os.environ.get("LORA_LAB_DEVICE", "")
    if forced not in ("", "cpu"):
        raise ValueError(f"LORA_LAB_DEVICE={forced!r}: set it to cpu, or unset it to use a GPU where there is one")
    if torch.cuda.is_available() and not forced:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        memory_gib = properties.total_memory / 2**30
        # A T4 says that it supports bfloat16, but emulates it: ask for the architecture.
        dtype = torch.bfloat16 if properties.major >= 8 else torch.float16
        large = memory_gib >= 14  # a T4 reports 14.6 GiB
        return Profile(
            device="cuda",
            name=properties.name,
            memory_gib=memory_gib,
            dtype=dtype,
            model="HuggingFaceTB/SmolLM2-1.7B-Instruct" if large else "smollm2-135m",
        )
    on_mps = torch.backends.mps.is_available() and not forced
    return Profile(
        device="mps" if on_mps else "cpu",
        name=f"Apple GPU ({platform.machine()})" if on_mps else f"CPU ({torch.get_num_threads()} threads)",
        memory_gib=_machine_memory_gib(),
        dtype=torch.float32,
        model="smollm2-135m",
    )


def _machine_memory_gib() -> float:
    limit = psutil.virtual_memory().total
    with contextlib.suppress(OSError, ValueError):  # a container's limit, where there is one (cgroup v2)
        limit = min(limit, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return limit / 2**30
