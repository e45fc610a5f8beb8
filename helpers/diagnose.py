"""Is this run really training? A table of the gradients, and a check for faults that raise no error."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import NamedTuple

from helpers.data import IGNORE_INDEX
from helpers.loss import label_tokens

import pandas as pd
import torch
from torch import nn

# One half of an adapter: lora_A or lora_B, or lora_embedding_A or …_B of an embedding.
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
    "or mask padding by position, as DataCollatorForSeq2Seq does.",
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

    It has one row per parameter, in the model's order (tied parameters once), with the columns
    `name`; `requires_grad`; `state`, which is "frozen" (it takes no gradient), "no gradient"
    (`.grad` is None), "zero" (every entry is zero), "non-finite" (an entry is inf or NaN) or "ok";
    and `norm`, the Euclidean norm of the gradient, NaN where there is none.
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

    Each fault has a function below, whose docstring says when it is one. The model is
    always looked at, the optimizer and the batch if they are given. With a batch, so are the
    gradients of its loss; without one, those in `.grad`, if any is not zero.

    The batch takes one forward and one backward pass in train mode, as training will, with the loss
    of the model; call it inside the `torch.autocast` of your loop if it has one. Afterwards all is
    as it was, modes, buffers and torch's random state included. (Hooks that you registered on
    parameters do run.)

    Args:
        model: a transformers model, plain, with PEFT adapters or with `helpers.lora.LoRALinear`
            layers. A parameter belongs to an adapter if a part of its name starts with "lora_".
        batch: input_ids, labels (batch, T; -100 where there is none) and what else the model takes.
        optimizer: the one that will step.
    """
    run = Run(model, batch, optimizer)
    found = _look(MODEL_CHECKS, run)
    if optimizer is not None:
        found += _look(OPTIMIZER_CHECKS, run)
    if batch is not None:
        found += _look(BATCH_CHECKS, run)
        if "no-labels" not in {finding.code for finding in found}:
            device = next(model.parameters()).device
            with _as_found(model):
                loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
                if loss.requires_grad:
                    loss.backward()
                found += _look(GRADIENT_CHECKS, run)
    elif any(p.grad is not None and p.grad.any() for p in model.parameters()):
        found += _look(GRADIENT_CHECKS, run)
    return found


class Run:
    """What the checks look at."""

    def __init__(self, model: nn.Module, batch: Mapping | None, optimizer: torch.optim.Optimizer | None) -> None:
        self.model, self.batch = model, batch or {}
        self.groups: list[dict] = optimizer.param_groups if optimizer else []
        self.optimizer_state: Mapping = optimizer.state if optimizer else {}
        self.parameters = dict(model.named_parameters())
        self.trainable = [name for name, p in self.parameters.items() if p.requires_grad]
        self.adapter = [name for name in self.parameters if _in_adapter(name)]
        self.configs = getattr(model, "peft_config", {})

    @cached_property
    def gradients(self) -> dict[str, str]:
        """The state of each parameter's gradient, as in `gradient_report`, when first read.

        So only GRADIENT_CHECKS, which run after the backward pass, may read it.
        """
        return {name: _state(p) for name, p in self.parameters.items()}


# To add a finding: a function of `run` that returns the message or None, its name in one of the
# tuples below, and under its code (the name, with hyphens) a remedy in REMEDIES.


def no_trainable_parameters(run: Run) -> str | None:
    """Every parameter is frozen."""
    return None if run.trainable else f"none of the {len(run.parameters)} parameters requires a gradient"


def base_trainable(run: Run) -> str | None:
    """There is an adapter, and weights of the base train too: others than `modules_to_save` and LoraConfig's `bias`."""
    biases = any(getattr(config, "bias", "none") != "none" for config in run.configs.values())
    base = [name for name in run.trainable if not _in_adapter(name) and not (biases and name.endswith(".bias"))]
    base = [name for name in base if not {"modules_to_save", "token_adapter"} & set(name.split("."))]
    if not run.adapter or not base:
        return None
    return f"besides the adapter, the base trains, and is not saved with it: {_listed(base)}"


def low_precision_adapter(run: Run) -> str | None:
    """The adapter trains in fp16 or bf16, where small updates are rounded away."""
    coarse = {name: p.dtype for name, p in run.parameters.items() if p.dtype in (torch.float16, torch.bfloat16)}
    low = [name for name in run.trainable if _in_adapter(name) and name in coarse]
    return f"small updates are rounded away in {coarse[low[0]]}: {_listed(low)}" if low else None


def partial_targets(run: Run) -> str | None:
    """A name in a LoraConfig's `target_modules` is the end of no adapted layer's name."""
    layers = {name.partition(".lora_")[0] for name in run.adapter}
    unmatched: set[str] = set()
    for config in run.configs.values():
        targets = getattr(config, "target_modules", None)
        is_lora = str(getattr(config, "peft_type", "")).rpartition(".")[2] == "LORA"
        if is_lora and targets and not isinstance(targets, str):
            unmatched |= {t for t in targets if not any(f".{layer}".endswith(f".{t}") for layer in layers)}
    return f"target_modules has names that matched no layer: {_listed(sorted(unmatched))}" if unmatched else None


def checkpointing_inactive(run: Run) -> str | None:
    """Gradient checkpointing is on, but layers are not in train mode, so it does nothing."""
    modules = run.model.named_modules()
    idle = [name for name, m in modules if vars(m).get("gradient_checkpointing") and not m.training]
    return f"gradient checkpointing has no effect in eval mode: {_listed(idle)}" if idle else None


def packed_for_inference(run: Run) -> str | None:
    """Bitsandbytes repacked 4-bit weights on the CPU (AVX512-BF16), as in eval mode: no gradient passes through."""
    states = {name: getattr(p, "quant_state", None) for name, p in run.parameters.items()}
    packed = [name for name, state in states.items() if getattr(state, "packing_format_for_cpu", False)]
    return f"no gradient passes through these 4-bit weights as they are: {_listed(packed)}" if packed else None


def not_in_optimizer(run: Run) -> str | None:
    """The optimizer does not hold a trainable parameter."""
    held = {p for group in run.groups for p in group["params"]}
    missing = [name for name in run.trainable if run.parameters[name] not in held]
    return f"the optimizer will never update {_listed(missing)}" if missing else None


def lr_zero(run: Run) -> str | None:
    """The learning rate of trainable parameters is 0.

    A schedule may start or end at 0. So where a scheduler has set `initial_lr` above 0, a rate of 0
    is a fault only if lora_B is still exactly zero after two steps: nobody steps the scheduler.
    """
    trainable = {run.parameters[name]: name for name in run.trainable}
    still: list[str] = []
    for group in run.groups:
        members = {p: trainable[p] for p in group["params"] if p in trainable}
        steps = max((float(run.optimizer_state.get(p, {}).get("step", 0)) for p in members), default=0.0)
        never_moved = steps >= 2 and any("lora_B" in name and not p.any() for p, name in members.items())
        if float(group["lr"]) == 0 and (never_moved or not group.get("initial_lr", 0) > 0):
            still += members.values()
    return f"the learning rate is 0 for {_listed(still)}" if still else None


def leftover_gradients(run: Run) -> str | None:
    """Gradients of an earlier backward pass would be added to this one's.

    A zero tensor on a trainable parameter does no harm; on a frozen one it lets weight decay move
    it.
    """
    held = {name: p for name, p in run.parameters.items() if p.grad is not None}
    leftover = [name for name, p in held.items() if p.grad.any() or not p.requires_grad]
    return f"the next backward pass would be added to the gradients of {_listed(leftover)}" if leftover else None


def no_labels(run: Run) -> str | None:
    """No label counts after the shift; gradients are then not looked at."""
    labels = run.batch.get("labels")
    if labels is None:
        return "the batch has no 'labels'"
    return None if label_tokens(labels) else "every label that counts is -100"


def eos_not_learned(run: Run) -> str | None:
    """An EOS directly follows a label, but no EOS in the batch is a label: the model does not learn to stop.

    EOS is what the model's config or generation config says. Padding (attention mask 0) and an EOS
    inside a prompt do not count, nor do rows without one.
    """
    labels, ids, mask = (run.batch.get(key) for key in ("labels", "input_ids", "attention_mask"))  # each (batch, T)
    eos = torch.tensor(sorted(_eos_ids(run.model)))
    if labels is None or ids is None or not len(eos) or not label_tokens(labels):
        return None
    attended = mask.bool() if mask is not None and mask.shape == ids.shape else torch.ones_like(ids, dtype=torch.bool)
    is_eos, is_label = torch.isin(ids, eos.to(ids.device)), labels != IGNORE_INDEX
    ends = is_eos[:, 1:] & attended[:, 1:] & is_label[:, :-1]  # (batch, T - 1): the end of a text that is learned
    if not ends.any() or (is_eos[:, 1:] & is_label[:, 1:]).any():
        return None
    return f"{int(ends.sum())} learned texts end with EOS, and in none of them is it a label"


def no_gradient(run: Run) -> str | None:
    """A trainable parameter gets no gradient."""
    none = [name for name, state in run.gradients.items() if state == "no gradient"]
    return f"trainable, but the loss sends no gradient to {_listed(none)}" if none else None


def zero_gradient(run: Run) -> str | None:
    """The gradient is exactly zero.

    Expected for lora_A while lora_B is zero, as at the default init (LoRA, section 4.1), since
    dL/dA = scaling * B^T (dL/dh) x^T: one half may wait for the other, but not if both are zero.
    """
    zero = [name for name, state in run.gradients.items() if state == "zero"]
    zero = [name for name in zero if not _waits_for_partner(name, run.parameters)]
    return f"the gradient is exactly zero for {_listed(zero)}" if zero else None


def non_finite_gradient(run: Run) -> str | None:
    """The gradient has an inf or a NaN."""
    broken = [name for name, state in run.gradients.items() if state == "non-finite"]
    return f"the gradient has inf or NaN for {_listed(broken)}" if broken else None


MODEL_CHECKS = (
    no_trainable_parameters, base_trainable, low_precision_adapter, partial_targets, checkpointing_inactive,
    packed_for_inference,
)  # fmt: skip
OPTIMIZER_CHECKS = (not_in_optimizer, lr_zero)
BATCH_CHECKS = (leftover_gradients, no_labels, eos_not_learned)
GRADIENT_CHECKS = (no_gradient, zero_gradient, non_finite_gradient)


def _look(checks: tuple[Callable[[Run], str | None], ...], run: Run) -> list[Finding]:
    found = {check.__name__.replace("_", "-"): check(run) for check in checks}
    return [Finding(code, message, REMEDIES[code]) for code, message in found.items() if message]


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
    """Return whether this is one half of an adapter, not zero itself, whose other half is still zero but can learn."""
    other = HALF.sub(lambda half: half[1] + ("B" if half[2] == "A" else "A"), name)
    if other == name or other not in parameters:
        return False
    return bool(parameters[name].any() and not parameters[other].any() and parameters[other].requires_grad)


def _in_adapter(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def _eos_ids(model: nn.Module) -> set[int]:
    ids: set[int] = set()
    for holder in ("config", "generation_config"):
        eos = getattr(getattr(model, holder, None), "eos_token_id", None)
        ids.update([eos] if isinstance(eos, int) else eos or [])
    return ids


def _listed(names: list[str]) -> str:
    """Return "a, b, c and 11 more"."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
