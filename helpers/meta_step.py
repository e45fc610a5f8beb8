"""A training step on PyTorch's meta device and its bytes at every moment, the work of `helpers.memory`."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import bitsandbytes as bnb
import pandas as pd
import torch
from peft import prepare_model_for_kbit_training
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode  # what torch's documentation of such modes imports
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.pytorch_utils import Conv1D

STRETCHES = ("forward", "backward above the lowest layer", "backward in the lowest layer", "optimizer")
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
    # bitsandbytes keeps one 8-bit code for the whole process, on the device of its first use: let that one have data.
    bnb.functional.quantize_blockwise(torch.zeros(1))
    constants = []
    # What transformers' replace_with_bnb_linear takes: GPT-2's Conv1D, with its weight the other way round, too.
    for name, old in [(name, m) for name, m in model.named_modules() if isinstance(m, Conv1D) or type(m) is nn.Linear]:
        if old is model.get_output_embeddings():
            continue
        options = {"compress_statistics": double_quant, "quant_type": "nf4"}
        out, into = reversed(old.weight.shape) if isinstance(old, Conv1D) else old.weight.shape
        sizes = (into, out, old.bias is not None)
        new = bnb.nn.Linear4bit(*sizes, compute_dtype=dtype, device="meta", **options).to(dtype)
        packed, state = bnb.functional.quantize_4bit(new.weight.data, **options)
        new.weight = bnb.nn.Params4bit(packed, quant_state=state, bnb_quantized=True, module=new, **options)
        new.quant_state = state
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
    if name.endswith("bit"):
        update = bnb.optim.AdamW8bit(parameters) if name.endswith("8bit") else bnb.optim.AdamW(parameters)
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
    return sum({id(s): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


class _Ledger(TorchDispatchMode):
    """Counts the bytes of every meta tensor made under it, while it lives, as logits, gradients or activations."""

    def __init__(self, logits_shapes: set[tuple[int, int]]) -> None:
        super().__init__()
        self.logits_shapes = logits_shapes  # (number of elements, size of the last dimension)
        self.kind: dict[int, str] = {}  # by the storage's id: torch keeps its Python object as long as it lives
        self.now = dict.fromkeys(("gradients", "activations", "logits"), 0)
        self.peaks = [dict(self.now)]  # one for each stretch of the step
        self.most_logits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        old = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor) or tensor.device.type != "meta":
                continue
            storage = tensor.untyped_storage()
            if id(storage) not in old and id(storage) not in self.kind:
                is_logits = (tensor.numel(), *tensor.shape[-1:]) in self.logits_shapes
                self.kind[id(storage)] = "logits" if is_logits else "activations"
                self.now[self.kind[id(storage)]] += storage.nbytes()
                weakref.finalize(storage, self._freed, id(storage), storage.nbytes())
        self.most_logits = max(self.most_logits, self.now["logits"])
        self.peaks[-1] = max(self.peaks[-1], dict(self.now), key=lambda moment: sum(moment.values()))
        return out

    def _freed(self, storage: int, size: int) -> None:
        self.now[self.kind.pop(storage)] -= size

    def is_gradient(self, parameter: nn.Parameter) -> None:
        storage = parameter.grad.untyped_storage()
        self.now[self.kind[id(storage)]] -= storage.nbytes()
        self.kind[id(storage)] = "gradients"
        self.now["gradients"] += storage.nbytes()

    def next_stretch(self, *_: object) -> None:
        self.peaks.append(dict(self.now))


@contextmanager
def _autocast(dtype: torch.dtype) -> Iterator[None]:
    """Autocast linear layers.

    torch has no autocast for the meta device, and its function modes are off while checkpointing
    recomputes: so the function itself is replaced.
    """
    linear = nn.functional.linear

    def cast(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return linear(x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype))

    nn.functional.linear = cast
    torch.set_autocast_enabled("cuda", True)  # for code that asks, such as PEFT's 4-bit layers
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        nn.functional.linear = linear


def _use_fused_attention(model: PreTrainedModel, dtype: torch.dtype, mask: torch.Tensor | None) -> None:
    """Have the model call PyTorch's fused kernel; torch itself would take the one that keeps T x T on meta."""

    def attend(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **options: Any
    ) -> tuple[torch.Tensor, None]:
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))  # (batch, heads, T, head size)
        bias = None
        if mask is not None:  # then transformers repeats keys and values, and torch makes the mask one of numbers
            key, value = (repeat_kv(tensor, query.shape[1] // key.shape[1]) for tensor in (key, value))
            bias = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), float("-inf"))
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # its public caller chooses by the device
        out = fused(query, key, value, 0.0, mask is None, attn_mask=bias, scale=options.get("scaling"))[0]
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("meta", attend)
    model.set_attn_implementation("meta")


def _mark_second_layer(model: PreTrainedModel, ledger: _Ledger) -> None:
    """Have the ledger begin a stretch when the backward pass has come down to the lowest layer."""

    def above_lowest(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        hook.remove()
        if inputs[0].requires_grad:
            inputs[0].register_hook(ledger.next_stretch)

    second = [*_layers(model), nn.Identity(), nn.Identity()][1]
    hook = second.register_forward_pre_hook(above_lowest)


def trace_step(
    model: PreTrainedModel,
    adapters: list[nn.Parameter],
    constants: list[torch.Tensor],
    state: list[torch.Tensor],
    update: Callable[[], object],
    shape: tuple[int, int],
    padded: bool,
    dtype: torch.dtype,
) -> pd.DataFrame:
    """Take a step on the meta device, and return its bytes, with a column for each of PARTS.

    The row "kept" has the parts as MemoryEstimate describes them. Each other row is the largest moment of one stretch,
    within which that is the same moment for any number of layers: so its bytes are linear in their number.
    """
    batch_size, length = shape
    trainable = adapters or list(model.parameters())
    static = {
        "weights": _bytes([*model.parameters(), *model.buffers()]) - _bytes(adapters),
        "quantization_constants": _bytes(constants),
        "adapters": _bytes(adapters),
        "optimizer_state": _bytes(state),
    }
    vocabulary = model.config.vocab_size
    ledger = _Ledger({(batch_size * (length - shift) * vocabulary, vocabulary) for shift in (0, 1)})
    for parameter in trainable:
        parameter.register_post_accumulate_grad_hook(ledger.is_gradient)
    _mark_second_layer(model, ledger)
    with ExitStack() as stack:
        if dtype != torch.float32:
            stack.enter_context(_autocast(dtype))
        ids = torch.zeros(shape, dtype=torch.long, device="meta")  # outside the ledger: the batch is not counted
        stack.enter_context(ledger)
        mask = torch.ones(batch_size, 1, length, length, dtype=torch.bool, device="meta") if padded else None
        _use_fused_attention(model, dtype, mask)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        kept = ledger.now["activations"]
        ledger.next_stretch()
        loss.backward()
        ledger.next_stretch()
        update()
    while len(ledger.peaks) < len(STRETCHES):
        ledger.next_stretch()
    whole = {"gradients": _bytes(p.grad for p in trainable), "activations": kept, "logits": ledger.most_logits}
    rows = [static | moment for moment in (whole, *ledger.peaks)]
    return pd.DataFrame(rows, index=["kept", *STRETCHES], columns=list(PARTS))
