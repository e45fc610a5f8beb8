"""A training step on PyTorch's meta device, where tensors have shapes and no data, and its bytes at every moment.

`helpers.memory.estimate_training_memory` puts it together.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import numpy as np
import torch
from peft import prepare_model_for_kbit_training
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv

PARTS = ("weights", "quantization_constants", "adapters", "optimizer_state", "gradients", "activations", "logits")


def build_model(config: PretrainedConfig, layers: int, dtype: torch.dtype) -> PreTrainedModel:
    """Return the config's causal language model with so many layers, on the meta device, in train mode."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    lists = (list(m) for m in model.modules() if isinstance(m, nn.ModuleList))
    return next((layers for layers in lists if len(layers) == model.config.num_hidden_layers), [])


def equal_layers(config: PretrainedConfig) -> bool:
    """Whether there are more than three layers, all of one kind, and with parameters of the same shapes."""
    if config.num_hidden_layers <= 3 or len(set(getattr(config, "layer_types", None) or [0])) > 1:
        return False
    layers = _layers(build_model(config, config.num_hidden_layers, torch.bfloat16))
    return len({tuple((name, p.shape) for name, p in layer.named_parameters()) for layer in layers}) == 1


def quantize(model: PreTrainedModel, dtype: torch.dtype, double_quant: bool) -> list[torch.Tensor]:
    """Make the linear layers bitsandbytes' own, prepare the model as for QLoRA, and return the constants."""
    constants = []
    # bitsandbytes keeps an 8-bit code for the whole process in name2qmap: one without data must not stay there.
    with mock.patch.dict(bnb.functional.name2qmap, clear=True):
        for name, old in [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]:
            if old is not model.get_output_embeddings():
                options = {"compute_dtype": dtype, "compress_statistics": double_quant, "quant_type": "nf4"}
                sizes = (old.in_features, old.out_features, old.bias is not None)
                new = bnb.nn.Linear4bit(*sizes, **options, device="meta").to(dtype)
                state = new.weight._quantize(torch.device("meta")).quant_state
                constants += [state.absmax, state.code]
                constants += [state.offset, state.state2.absmax, state.state2.code] if double_quant else []
                model.set_submodule(name, new)
    model.is_loaded_in_4bit = True
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return constants


def optimizer_state(
    name: str, parameters: list[nn.Parameter], foreach: bool
) -> tuple[list[torch.Tensor], Callable[[], object]]:
    """Return the state that the optimizer keeps on the device after its first step, and what its steps do."""
    if name.endswith("8bit"):
        update = bnb.optim.AdamW8bit(parameters)
        for index, parameter in enumerate(parameters):
            update.init_state(update.param_groups[0], parameter, 0, index)
    else:
        update = torch.optim.SGD(parameters) if name == "sgd" else torch.optim.AdamW(parameters, foreach=foreach)
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        update.step()
        update.zero_grad()
    tensors = [value for state in update.state.values() for value in state.values() if torch.is_tensor(value)]
    in_place = name != "adamw_torch"  # makes no temporary tensors
    return [tensor for tensor in tensors if tensor.device.type == "meta"], (int if in_place else update.step)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


class _Ledger(TorchDispatchMode):
    """Counts the bytes of every meta tensor made under it, while it lives, as logits, gradients or activations."""

    def __init__(self, logits_shapes: set[tuple[int, int]]) -> None:
        super().__init__()
        self.logits_shapes = logits_shapes  # (number of elements, size of the last dimension)
        self.kind: dict[int, str] = {}  # by storage
        self.now = dict.fromkeys(("gradients", "activations", "logits"), 0)
        self.peaks = [dict(self.now)]  # one for each stretch of the step
        self.most_logits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        old = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_iter(out):
            if not isinstance(tensor, torch.Tensor) or tensor.device.type != "meta":
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in old and storage._cdata not in self.kind:
                is_logits = (tensor.numel(), *tensor.shape[-1:]) in self.logits_shapes
                self.kind[storage._cdata] = "logits" if is_logits else "activations"
                self.now[self.kind[storage._cdata]] += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.most_logits = max(self.most_logits, self.now["logits"])
        self.peaks[-1] = max(self.peaks[-1], dict(self.now), key=lambda moment: sum(moment.values()))
        return out

    def _freed(self, storage: int, size: int) -> None:
        self.now[self.kind.pop(storage)] -= size

    def is_gradient(self, parameter: nn.Parameter) -> None:
        storage = parameter.grad.untyped_storage()
        self.now[self.kind[storage._cdata]] -= storage.nbytes()
        self.kind[storage._cdata] = "gradients"
        self.now["gradients"] += storage.nbytes()

    def next_stretch(self, *_: object) -> None:
        self.peaks.append(dict(self.now))


def trace_step(
    model: PreTrainedModel,
    adapters: list[nn.Parameter],
    constants: list[torch.Tensor],
    state: list[torch.Tensor],
    update: Callable[[], object],
    shape: tuple[int, int],
    padded: bool,
    dtype: torch.dtype,
) -> np.ndarray:
    """Take a step on the meta device. Returns bytes, one column for each of PARTS.

    The first row has the parts as MemoryEstimate describes them. Each other row is the largest moment of one stretch
    of the step: forward, backward down to the lowest layer, the rest of backward, optimizer. Within a stretch the
    largest moment is the same one for any number of layers, so that its bytes are linear in that number.
    """
    mask = None

    def attend(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **options: Any
    ) -> tuple[torch.Tensor, None]:
        """PyTorch's fused attention; torch itself would take the kernel that keeps T x T on the meta device."""
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        bias = None
        if mask is not None:  # then transformers repeats keys and values, and torch makes the mask one of numbers
            key, value = (repeat_kv(tensor, query.shape[1] // key.shape[1]) for tensor in (key, value))
            bias = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), float("-inf"))
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out = fused(query, key, value, 0.0, mask is None, attn_mask=bias, scale=options.get("scaling"))[0]
        return out.transpose(1, 2).contiguous(), None

    linear = nn.functional.linear

    def autocast_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return linear(x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype))

    AttentionInterface.register("meta", attend)
    model.set_attn_implementation("meta")
    trainable = adapters or list(model.parameters())
    static = {
        "weights": _bytes([*model.parameters(), *model.buffers()]) - _bytes(adapters),
        "quantization_constants": _bytes(constants),
        "adapters": _bytes(adapters),
        "optimizer_state": _bytes(state),
    }
    vocabulary = model.config.vocab_size
    ledger = _Ledger({(shape[0] * (shape[1] - shift) * vocabulary, vocabulary) for shift in (0, 1)})
    for parameter in trainable:
        parameter.register_post_accumulate_grad_hook(ledger.is_gradient)

    def above_lowest(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        hook.remove()
        if inputs[0].requires_grad:
            inputs[0].register_hook(ledger.next_stretch)

    second = [*_layers(model), nn.Identity(), nn.Identity()][1]
    hook = second.register_forward_pre_hook(above_lowest)
    ids = torch.zeros(shape, dtype=torch.long, device="meta")
    with ExitStack() as stack:
        if dtype != torch.float32:  # torch has no autocast for the meta device
            stack.enter_context(mock.patch.object(nn.functional, "linear", autocast_linear))
            torch.set_autocast_enabled("cuda", True)  # for code that asks, such as PEFT's 4-bit layers
            stack.callback(torch.set_autocast_enabled, "cuda", False)
        stack.enter_context(ledger)
        if padded:
            mask = torch.ones(shape[0], 1, shape[1], shape[1], dtype=torch.bool, device="meta")
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        kept = ledger.now["activations"]
        ledger.next_stretch()
        loss.backward()
        ledger.next_stretch()
        update()
    while len(ledger.peaks) < 4:
        ledger.next_stretch()
    whole = {"gradients": _bytes(p.grad for p in trainable), "activations": kept, "logits": ledger.most_logits}
    return np.array([[(static | row)[part] for part in PARTS] for row in (whole, *ledger.peaks)])
