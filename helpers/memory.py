"""What a training step needs in memory: measured, and estimated from a configuration alone.

The estimate is a real step on PyTorch's meta device, where tensors have no data: each is counted while it lives.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

from helpers import meta_step
from helpers.hardware import profile
from helpers.models import enable_checkpointing

import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from transformers import PretrainedConfig

CHOICES = {
    "quantization": (None, "nf4"),
    "dtype": ("float32", "bfloat16", "float16"),
    "optimizer": (
        "adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit",
        "sgd",
    ),
    "device": ("cuda", "cpu"),
}  # fmt: skip


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one training step needs, by what they are for."""

    weights: int  # parameters and buffers of the base model; NF4 packs two weights in a byte
    quantization_constants: int  # what NF4 keeps beside them: scales, the scales' own scales, and code books
    adapters: int  # LoRA's A and B
    optimizer_state: int  # after the first step
    gradients: int  # of all trainable parameters, as the optimizer finds them
    activations: int  # what autograd keeps at the end of the forward pass, without `logits`
    logits: int  # the most that the logits and their copies (fp32, log-softmax, gradient) take at one time
    # The peak. It is not the sum of the above, which are not all there at once: the backward pass frees activations
    # while it makes gradients, and needs room for temporary tensors.
    total: int
    # The bytes at the moment of the peak, by the seven names above; they sum to `total`. Here `activations` includes
    # all temporary tensors, such as those of a layer that checkpointing computes again.
    at_peak: dict[str, int]

    @property
    def static(self) -> int:
        """Bytes that are there all the time: weights, constants, adapters and the optimizer's state."""
        return self.weights + self.quantization_constants + self.adapters + self.optimizer_state


def estimate_training_memory(
    config: PretrainedConfig,
    *,
    r: int | None,
    target_modules: str | list[str] | None = "all-linear",
    quantization: str | None = None,
    double_quant: bool = True,
    dtype: str | torch.dtype = "bfloat16",
    batch_size: int,
    sequence_length: int,
    gradient_checkpointing: bool = False,
    optimizer: str = "adamw_torch",
    padded: bool = False,
    device: str = "cuda",
) -> MemoryEstimate:
    """Estimate the memory of a training step of a causal language model, without weights and without a GPU.

    The step is one after the first: the optimizer has its state, and `zero_grad` has set the gradients to None. With
    gradient accumulation they stay between micro-batches: add `gradients` to the total. No dropout. In bfloat16 and
    float16 the forward pass runs under autocast, as in the Trainer with `bf16=True`; PEFT keeps adapters in fp32.
    Attention is PyTorch's fused kernel, which does not keep T x T probabilities.

    Counted is what PyTorch's allocator hands out. A process on a GPU needs more: the CUDA context, workspaces,
    fragmentation. Fused losses, which never hold all logits, need less.

    Args:
        config: of a transformers model for AutoModelForCausalLM, such as a LlamaConfig.
        r: rank of the adapter, or None for full fine-tuning.
        target_modules: the layers that get an adapter, as for `peft.LoraConfig`.
        quantization: None, or "nf4": all linear layers but the output layer in 4 bits, in blocks of 64, and the other
            weights in fp32, as `load_base(quantization="nf4")` and PEFT's `prepare_model_for_kbit_training` leave them.
            As in bitsandbytes, GPT-2's Conv1D counts as linear, and experts that are one 3-D parameter do not.
        double_quant: quantize NF4's scales to 8 bits, in blocks of 256.
        dtype: of the base weights, or what 4-bit layers multiply in.
        batch_size, sequence_length: the micro-batch, in rows and tokens.
        gradient_checkpointing: store each layer's input only and recompute the layer in the backward pass.
        optimizer: by its name in TrainingArguments. Paged state counts, though CUDA may move it out of the GPU.
        padded: some row has padding, so that attention gets an explicit mask (batch, 1, tokens, tokens).
        device: "cuda", where "adamw_torch" updates all parameters at once, or "cpu", where it goes one by one.
    """
    dtype = str(dtype).removeprefix("torch.")
    given = {"quantization": quantization, "dtype": dtype, "optimizer": optimizer, "device": device}
    for name, value in given.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, CHOICES[name]))}")
    for name, number in {"r": r, "batch_size": batch_size, "sequence_length": sequence_length}.items():
        if number is not None and number < 1:
            raise ValueError(f"{name}={number}: give at least 1{', or None for no adapter' if name == 'r' else ''}")
    if quantization and r is None:
        raise ValueError("r=None: 4-bit weights cannot be trained themselves; give r, or quantization=None")

    torch_dtype = getattr(torch, dtype)

    def step(layers: int) -> pd.DataFrame:
        model = meta_step.build_model(config, layers, torch_dtype)
        constants = meta_step.quantize(model, torch_dtype, double_quant) if quantization else []
        if gradient_checkpointing:
            enable_checkpointing(model)
            model.enable_input_require_grads()
        if r is not None:
            lora = LoraConfig(r=r, target_modules=target_modules, task_type="CAUSAL_LM")
            get_peft_model(model, lora, low_cpu_mem_usage=True)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        adapters = [] if r is None else trainable
        state, update = meta_step.optimizer_state(optimizer, trainable, foreach=device == "cuda")
        shape = (batch_size, sequence_length)
        return meta_step.trace_step(model, adapters, constants, state, update, shape, padded, torch_dtype)

    depth = config.num_hidden_layers
    try:
        if meta_step.equal_layers(config):  # every count is linear in their number: two and three of them tell all
            two = step(2)
            table = two + (depth - 2) * (step(3) - two)
        else:
            table = step(depth)
    except RuntimeError as error:  # mostly an operation that asks a meta tensor for its data
        raise ValueError(f"config: a {config.model_type} model cannot run on the meta device: {error}") from error
    total = table.drop("kept").sum(axis=1)  # of each stretch's largest moment
    at_peak = table.loc[total.idxmax()].to_dict()
    return MemoryEstimate(**table.loc["kept"].to_dict(), total=int(total.max()), at_peak=at_peak)


class PeakMemory:
    """What `measure_peak_memory` found: `peak`, in bytes above what was there at the start of the region."""

    peak: int | None = None


_measuring: list[PeakMemory] = []  # the region that is being measured


@contextmanager
def measure_peak_memory(device: str | torch.device | None = None) -> Iterator[PeakMemory]:
    """Measure the most memory that tensors took at one time inside the region, above what was there at its start.

        with memory.measure_peak_memory() as measured:
            model(**batch).loss.backward()
        print(measured.peak)

    On CUDA it reads the caching allocator's counters (`torch.cuda.max_memory_allocated`). On a CPU it adds up the
    memory events of torch's profiler, which does not see tensors freed that were there before, and which grows with
    every operation: measure a few steps. If the region raises, `peak` stays None.

    Args:
        device: "cuda" or "cpu"; the hardware profile's by default.
    """
    place = torch.device(device or profile().device)
    if place.type not in CHOICES["device"]:
        raise ValueError(f"device={str(place)!r}: choose one of {', '.join(map(repr, CHOICES['device']))}")
    # torch has no public way to ask whether its profiler runs.
    if _measuring or (place.type == "cpu" and torch._C._autograd._profiler_enabled()):
        raise RuntimeError("memory is being measured or profiled already; measure one region at a time")
    measured = PeakMemory()
    _measuring.append(measured)
    try:
        if place.type == "cuda":
            before = torch.cuda.memory_allocated(place)
            torch.cuda.reset_peak_memory_stats(place)
            yield measured
            measured.peak = torch.cuda.max_memory_allocated(place) - before
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler's library writes to stderr
            with torch.autograd.profiler.profile(profile_memory=True) as record:
                yield measured
            events = [event for event in record.kineto_results.events() if event.name() == "[memory]"]
            events = [event for event in events if event.device_type() == torch.autograd.DeviceType.CPU]
            sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
            measured.peak = max(accumulate(sizes, initial=0))
    finally:
        _measuring.clear()
