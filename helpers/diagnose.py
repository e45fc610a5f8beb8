"""Is this run really training? A table of the gradients, and a check for faults that raise no error."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from helpers.data import IGNORE_INDEX

import pandas as pd
import torch
from torch import nn

# One half of an adapter: lora_A or lora_B of a linear layer, lora_embedding_A or lora_embedding_B of an embedding.
HALF = re.compile(r"\b(lora_(?:embedding_)?)([AB])\b")

REMEDIES = {
    "no-trainable-parameters": "Load an adapter with PeftModel.from_pretrained(…, is_trainable=True), and call "
    "prepare_model_for_kbit_training before get_peft_model, not after it.",
    "base-trainable": "Freeze it with requires_grad_(False), or name its modules in LoraConfig(modules_to_save=…).",
    "low-precision-adapter": "Use get_peft_model, not add_adapter, or cast the trainable parameters with .float() "
    "before the optimizer is built.",
    "partial-targets": "Compare with the names in model.named_modules(), and correct LoraConfig(target_modules=…).",
    "checkpointing-inactive": "Call model.train() before the forward pass, as Trainer.train() does.",
    "packed-for-inference": "Call model.state_dict(), which unpacks them, whenever training goes on after eval mode.",
    "not-in-optimizer": "Build the optimizer after get_peft_model, from all parameters that require a gradient.",
    "lr-zero": "Set a learning rate above 0, and call scheduler.step() after every optimizer.step() of a warm-up.",
    "leftover-gradients": "Call model.zero_grad() before the first step, and optimizer.zero_grad() after every step.",
    "no-labels": "Keep 'labels' in the batch, and raise max_length or shorten the prompts, so that truncation leaves "
    "part of each completion.",
    "eos-not-learned": "Give padding a token of its own, since DataCollatorForLanguageModeling masks every pad token, "
    "or mask padding by position, as helpers.data.Collator does.",
    "no-gradient": "Call model.enable_input_require_grads() or checkpoint with use_reentrant=False if gradient "
    "checkpointing is on; otherwise look for a detach(), or freeze what the loss does not use.",
    "zero-gradient": "Check that lora_alpha is not 0, that lora_dropout is below 1, and that lora_A and lora_B are not "
    "both zero.",
    "non-finite-gradient": "Clear the gradients without a step (clipping cannot mend them), look for inf or NaN in "
    "weights and loss, and lower the learning rate or the loss scale.",
}


class Finding(NamedTuple):
    """One fault: `code` is a short name, `message` says what is wrong and where, `remedy` what to do about it."""

    code: str
    message: str
    remedy: str


def gradient_report(model: nn.Module) -> pd.DataFrame:
    """Return a table of the model's parameters and the gradients that they hold now.

    Returns:
        One row per parameter, in the model's order (tied parameters once), with the columns
        `name`; `requires_grad`; `state`, which is "frozen" (it takes no gradient), "no gradient" (`.grad` is None),
        "zero" (every entry is zero), "non-finite" (an entry is inf or NaN) or "ok"; and `norm`, the Euclidean norm of
        the gradient, NaN where there is none.
    """
    rows = []
    for name, parameter in model.named_parameters():
        norm = float("nan")
        if (grad := parameter.grad) is not None:
            norm = torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32)).item()
        rows.append((name, parameter.requires_grad, _state(parameter), norm))
    return pd.DataFrame(rows, columns=["name", "requires_grad", "state", "norm"])


def diagnose(
    model: nn.Module,
    batch: Mapping[str, torch.Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[Finding]:
    """Look for faults that raise no error and leave a run training badly, or not at all. An empty list is good news.

    Always checked:
        no-trainable-parameters  every parameter is frozen
        base-trainable           there is a LoRA adapter, and weights of the base train too (those of `modules_to_save`
                                 and of a LoraConfig's `bias` may)
        low-precision-adapter    the adapter trains in fp16 or bf16, where small updates are rounded away
        partial-targets          a name in a LoraConfig's `target_modules` matched no layer
        checkpointing-inactive   gradient checkpointing is on, but layers are not in train mode, so it does nothing
        packed-for-inference     bitsandbytes repacked 4-bit weights on the CPU (AVX512-BF16), as it does in eval mode,
                                 and no gradient passes through them
    With an optimizer:
        not-in-optimizer         it does not hold a trainable parameter
        lr-zero                  the learning rate of trainable parameters is 0. A schedule may start or end there, so
                                 where a scheduler has set `initial_lr` above 0 it counts only if lora_B is still
                                 exactly zero after two steps: the scheduler is never stepped
    With a batch:
        leftover-gradients       gradients of an earlier backward pass would be added to this one's (a zero tensor on a
                                 trainable parameter does no harm; on a frozen one it lets weight decay move it)
        no-labels                no label counts after the shift; gradients are not looked at
        eos-not-learned          an EOS directly follows a label, but no EOS in the batch is a label: the model does not
                                 learn to stop. EOS is what the model's config or generation config says; padding
                                 (attention mask 0) and an EOS inside a prompt do not count, nor do rows without one
    With a batch, for the gradients of its loss; without one, for those found in `.grad` if any is not zero:
        no-gradient              a trainable parameter gets none
        zero-gradient            its gradient is exactly zero. Lawful for one half of an adapter while the other half
                                 is zero, as lora_A's is at the default init (LoRA, section 4.1); not if both are zero
        non-finite-gradient      its gradient has an inf or a NaN

    The batch takes one forward and one backward pass in train mode, as training will, with the loss of the model; call
    it inside the `torch.autocast` of your loop if it has one. Parameters, gradients, buffers, train and eval modes,
    the random state of torch (CPU and CUDA) and the optimizer are afterwards as they were, also if the pass raises.
    (Hooks that you registered on parameters do run.)

    Args:
        model: a transformers model, plain, with PEFT adapters or with `helpers.lora.LoRALinear` layers. A parameter
            belongs to an adapter if a part of its name starts with "lora_".
        batch: input_ids, labels (rows, tokens; -100 where there is none) and what else the model takes.
        optimizer: the one that will step.

    Returns:
        The findings, at most one per code, in the order above.
    """
    found = dict(_check_model(model))
    if optimizer is not None:
        found.update(_check_optimizer(model, optimizer))
    if batch is not None:
        found.update(_check_batch(model, batch))
        if "no-labels" not in found:
            device = next(model.parameters()).device
            with _as_found(model):
                loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
                if loss.requires_grad:
                    loss.backward()
                found.update(_check_gradients(model))
    elif any(p.grad is not None and p.grad.any() for p in model.parameters()):
        found.update(_check_gradients(model))
    return [Finding(code, message, REMEDIES[code]) for code, message in found.items()]


def _check_model(model: nn.Module) -> Iterator[tuple[str, str]]:
    parameters = dict(model.named_parameters())
    trainable = [name for name, p in parameters.items() if p.requires_grad]
    adapter = [name for name in parameters if _in_adapter(name)]
    configs = getattr(model, "peft_config", {})
    if not trainable:
        yield "no-trainable-parameters", f"none of the {len(parameters)} parameters requires a gradient"
    if adapter:
        biases = any(getattr(config, "bias", "none") != "none" for config in configs.values())
        base = [name for name in trainable if not _in_adapter(name) and not (biases and name.endswith(".bias"))]
        if base := [name for name in base if not {"modules_to_save", "token_adapter"} & set(name.split("."))]:
            yield "base-trainable", f"besides the adapter, the base trains, and is not saved with it: {_listed(base)}"
    coarse = {name: p.dtype for name, p in parameters.items() if p.dtype in (torch.float16, torch.bfloat16)}
    if low := [name for name in trainable if _in_adapter(name) and name in coarse]:
        yield "low-precision-adapter", f"small updates are rounded away in {coarse[low[0]]}: {_listed(low)}"
    if unmatched := sorted({name for config in configs.values() for name in _unmatched(adapter, config)}):
        yield "partial-targets", f"target_modules has names that matched no layer: {_listed(unmatched)}"
    idle = [name for name, m in model.named_modules() if vars(m).get("gradient_checkpointing") and not m.training]
    if idle:
        yield "checkpointing-inactive", f"gradient checkpointing has no effect in eval mode: {_listed(idle)}"
    states = {name: getattr(p, "quant_state", None) for name, p in parameters.items()}
    if packed := [name for name, state in states.items() if getattr(state, "packing_format_for_cpu", False)]:
        yield "packed-for-inference", f"no gradient passes through these 4-bit weights as they are: {_listed(packed)}"


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, str]]:
    trainable = {p: name for name, p in model.named_parameters() if p.requires_grad}
    held = {p for group in optimizer.param_groups for p in group["params"]}
    if missing := [name for p, name in trainable.items() if p not in held]:
        yield "not-in-optimizer", f"the optimizer will never update {_listed(missing)}"
    still: list[str] = []
    for group in optimizer.param_groups:
        members = {p: trainable[p] for p in group["params"] if p in trainable}
        steps = max((float(optimizer.state.get(p, {}).get("step", 0)) for p in members), default=0.0)
        never_moved = steps >= 2 and any("lora_B" in name and not p.any() for p, name in members.items())
        if float(group["lr"]) == 0 and (never_moved or not group.get("initial_lr", 0) > 0):
            still += members.values()
    if still:
        yield "lr-zero", f"the learning rate is 0 for {_listed(still)}"


def _check_batch(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str]]:
    held = {name: p for name, p in model.named_parameters() if p.grad is not None}
    if leftover := [name for name, p in held.items() if p.grad.any() or not p.requires_grad]:
        yield "leftover-gradients", f"the next backward pass would be added to the gradients of {_listed(leftover)}"
    labels, ids, mask = (batch.get(key) for key in ("labels", "input_ids", "attention_mask"))
    if labels is None or not (labels[:, 1:] != IGNORE_INDEX).any():
        yield "no-labels", "the batch has no 'labels'" if labels is None else "every label that counts is -100"
        return
    eos = torch.tensor(sorted(_eos_ids(model)))
    if ids is None or not len(eos):
        return
    attended = mask.bool() if mask is not None and mask.shape == ids.shape else torch.ones_like(ids, dtype=torch.bool)
    is_eos, is_label = torch.isin(ids, eos.to(ids.device)), labels != IGNORE_INDEX
    ends = is_eos[:, 1:] & attended[:, 1:] & is_label[:, :-1]  # the end of a text that is learned
    if ends.any() and not (is_eos[:, 1:] & is_label[:, 1:]).any():
        yield "eos-not-learned", f"{int(ends.sum())} learned texts end with EOS, and in none of them is it a label"


def _check_gradients(model: nn.Module) -> Iterator[tuple[str, str]]:
    parameters = dict(model.named_parameters())
    states = {name: _state(p) for name, p in parameters.items()}
    if none := [name for name, state in states.items() if state == "no gradient"]:
        yield "no-gradient", f"trainable, but the loss sends no gradient to {_listed(none)}"
    zero = [name for name, state in states.items() if state == "zero" and not _waits_for_partner(name, parameters)]
    if zero:
        yield "zero-gradient", f"the gradient is exactly zero for {_listed(zero)}"
    if broken := [name for name, state in states.items() if state == "non-finite"]:
        yield "non-finite-gradient", f"the gradient has inf or NaN for {_listed(broken)}"


@contextlib.contextmanager
def _as_found(model: nn.Module) -> Iterator[None]:
    """Run the body in train mode with all gradients cleared, then put everything back but what the body returns."""
    grads = [(p, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m.named_buffers(recurse=False)]
    cuda = sorted({p.device.index for p, _ in grads if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda, device_type="cuda"), torch.enable_grad():
        try:
            for parameter, _ in grads:
                parameter.grad = None
            model.train()
            yield
        finally:
            for parameter, grad in grads:
                parameter.grad = grad
            for module, mode in modes:
                module.training = mode
            for module, name, buffer, values in buffers:
                if not torch.equal(buffer, values):  # writing would invalidate a graph that holds the buffer
                    with torch.no_grad():
                        buffer.copy_(values)
                setattr(module, name, buffer)


def _state(parameter: nn.Parameter) -> str:
    if not parameter.requires_grad:
        return "frozen"
    if parameter.grad is None:
        return "no gradient"
    if not parameter.grad.isfinite().all():
        return "non-finite"
    return "ok" if parameter.grad.any() else "zero"


def _waits_for_partner(name: str, parameters: Mapping[str, nn.Parameter]) -> bool:
    """Is this one half of an adapter, not zero itself, whose other half is still zero but can learn?"""
    other = HALF.sub(lambda half: half[1] + ("B" if half[2] == "A" else "A"), name)
    if other == name or other not in parameters:
        return False
    return bool(parameters[name].any() and not parameters[other].any() and parameters[other].requires_grad)


def _in_adapter(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def _unmatched(adapter: Iterable[str], config: object) -> list[str]:
    """Return the names in a LoraConfig's target_modules that are the end of no adapted layer's name."""
    targets = getattr(config, "target_modules", None)
    if str(getattr(config, "peft_type", "")).rpartition(".")[2] != "LORA" or not targets or isinstance(targets, str):
        return []
    layers = {name.partition(".lora_")[0] for name in adapter}
    return [target for target in targets if not any(f".{layer}".endswith(f".{target}") for layer in layers)]


def _eos_ids(model: nn.Module) -> set[int]:
    ids: set[int] = set()
    for holder in ("config", "generation_config"):
        eos = getattr(getattr(model, holder, None), "eos_token_id", None)
        ids.update([eos] if isinstance(eos, int) else eos or [])
    return ids


def _listed(names: list[str]) -> str:
    """Return "a, b, c and 11 more"."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
