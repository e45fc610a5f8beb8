"""Is this run really training? A table of the gradients, and a check for faults that raise no error."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from helpers.data import IGNORE_INDEX
from helpers.evaluation import token_ids
from helpers.loss import label_tokens

import pandas as pd
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

# One half of an adapter: lora_A or lora_B, or lora_embedding_A or …_B of an embedding.
HALF = re.compile(r"\b(lora_(?:embedding_)?)([AB])\b")
EXPERT = re.compile(r"\.experts\.\d+\.")


REMEDIES = {
    "no-trainable-parameters": "Load an adapter with PeftModel.from_pretrained(…, is_trainable=True), and call "
    "prepare_model_for_kbit_training before get_peft_model, not after it.",
    "base-trainable": "Freeze it with requires_grad_(False), or name its modules in LoraConfig(modules_to_save=…).",
    "low-precision-adapter": "Use get_peft_model, not add_adapter, or cast the trainable parameters with .float() "
    "before the optimizer is built.",
    "nested-adapter": "Call get_peft_model once, on a base that has just been loaded; a cell that was run twice has "
    "wrapped the model twice, and what it saves does not load on the base.",
    "idle-adapter": "Call model.set_adapter(…) with the one that is to train, after the last one has been added or "
    "loaded.",
    "partial-targets": "Compare with the names in model.named_modules(), and correct LoraConfig(target_modules=…).",
    "unmatched-settings": "Compare with the names in model.named_modules(), and correct or remove it.",
    "tied-target": "Leave it out of target_modules, or load the base with tie_word_embeddings=False in its config.",
    "checkpointing-inactive": "Call model.train() before the forward pass, as Trainer.train() does.",
    "packed-for-inference": "Call model.state_dict(), which unpacks them, whenever training goes on after eval mode.",
    "not-in-optimizer": "Build the optimizer after get_peft_model, from all parameters that require a gradient.",
    "lr-zero": "Set a learning rate above 0, and call scheduler.step() after every optimizer.step() of a warm-up.",
    "leftover-gradients": "Call model.zero_grad() before the first step, and optimizer.zero_grad() after every step.",
    "adapter-not-loaded": "See that the file is whole, and that adapter and base are of the same library and model "
    "class, so that the names agree.",
    "no-labels": "Keep 'labels' in the batch, and raise max_length or shorten the prompts, so that truncation leaves "
    "part of each completion.",
    "rows-without-labels": "Raise max_length or leave these rows out; if a collator looks for a marker, see that it is "
    "in each row.",
    "shifted-labels": "Pass labels that are a copy of input_ids, -100 where there is none: the model shifts them.",
    "padding-as-labels": "Set labels to -100 where attention_mask is 0, as DataCollatorForSeq2Seq does.",
    "mismatched-labels": "Make the labels from the very input_ids of the batch, after padding and truncation.",
    "eos-of-two-minds": "Set eos_token_id in model.generation_config, and in model.config, to the token that ends the "
    "labels, or set tokenizer.eos_token to the model's and encode again.",
    "completion-cut": "Raise max_length or shorten the prompts; a completion without its EOS teaches not to stop.",
    "untrained-tokens": "Train their rows: LoraConfig(trainable_token_indices=[…]), or words that the tokenizer has.",
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
    *,
    adapter: str | Path | None = None,
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
        adapter: the folder that the adapter was loaded from. A file whose names match nothing in the
            model is loaded without an error, and the model is then that with a fresh adapter.
    """
    run = Run(model, batch, optimizer, adapter)
    found = _look(MODEL_CHECKS, run)
    if optimizer is not None:
        found += _look(OPTIMIZER_CHECKS, run)
    if batch is not None:
        found += _look((leftover_gradients, *BATCH_CHECKS, untrained_tokens), run)
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


def diagnose_batch(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> list[Finding]:
    """Look for faults in the labels of a batch alone, without a pass through the model: part of `diagnose`."""
    return _look(BATCH_CHECKS, Run(model, batch))


class Run:
    """What the checks look at."""

    def __init__(
        self,
        model: nn.Module,
        batch: Mapping | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        folder: str | Path | None = None,
    ) -> None:
        self.model, self.batch, self.folder = model, batch or {}, folder
        self.groups: list[dict] = optimizer.param_groups if optimizer else []
        self.optimizer_state: Mapping = optimizer.state if optimizer else {}
        self.configs = getattr(model, "peft_config", {})

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    @cached_property
    def trainable(self) -> list[str]:
        return [name for name, p in self.parameters.items() if p.requires_grad]

    @cached_property
    def adapter(self) -> list[str]:
        """The adapter's parameters."""
        return [name for name in self.parameters if _in_adapter(name)]

    @cached_property
    def layers(self) -> set[str]:
        """What is adapted, by the base's names; of experts in one parameter the parameter too."""
        names = {_layer(name) for name in self.adapter}
        wrapped = [(name, getattr(m, "parameter_name", None)) for name, m in self.model.named_modules()]
        return names | {f"{_layer(name)}.{inside}" for name, inside in wrapped if inside}

    @cached_property
    def attended(self) -> torch.Tensor:
        """Which tokens are no padding, (batch, T); without an attention mask, those that are not the padding token."""
        ids, mask = self.batch["input_ids"], self.batch.get("attention_mask")
        if mask is not None and mask.shape == ids.shape:
            return mask.bool()
        pad = getattr(getattr(self.model, "config", None), "pad_token_id", None)
        return torch.ones_like(ids, dtype=torch.bool) if pad is None or pad in _eos_ids(self.model) else ids != pad

    @cached_property
    def labelled(self) -> torch.Tensor | None:
        """Which tokens are labels, (batch, T), if labels are what they should be: a copy of the ids, or -100."""
        ids, labels = self.batch.get("input_ids"), self.batch.get("labels")
        if ids is None or labels is None or ids.shape != labels.shape:
            return None
        counts = labels != IGNORE_INDEX
        return counts if (labels == ids)[counts].all() else None

    @cached_property
    def wrong_labels(self) -> tuple[int, int]:
        """How many labels that count are not the token at their place, and how many are the next one."""
        labels, ids = self.batch.get("labels"), self.batch.get("input_ids")
        encoder = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        if encoder or labels is None or ids is None or labels.shape != ids.shape:
            return 0, 0
        labels, here = labels[:, 1:], ids[:, 1:]  # (batch, T - 1): the first label never counts
        following = torch.nn.functional.pad(here[:, 1:], (0, 1), value=IGNORE_INDEX)
        counts = labels != IGNORE_INDEX
        return int((counts & (labels != here)).sum()), int((counts & (labels == following)).sum())

    @cached_property
    def last_two(self) -> torch.Tensor | None:
        """The last two tokens of each completion, (completions, 2): of rows whose prompt is masked and whose end is a
        label.
        """
        if self.labelled is None:
            return None
        ids, kept, rows = self.batch["input_ids"], self.attended, torch.arange(len(self.labelled))
        place = torch.arange(ids.shape[1], device=ids.device)
        first = kept.int().argmax(dim=1)
        last = torch.where(kept, place, 0).argmax(dim=1)  # (batch,): the largest place that is kept
        tail = self.labelled[rows, last] | self.labelled[rows, (last - 1).clamp(min=0)]
        tail &= ~self.labelled[rows, first]
        return torch.stack([ids[rows, (last - 1).clamp(min=0)], ids[rows, last]], dim=1)[tail]

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


def nested_adapter(run: Run) -> str | None:
    """There is a PeftModel inside a PeftModel."""
    wrappers = sum(isinstance(module, PeftModel) for module in run.model.modules())
    return f"the model is wrapped {wrappers} times, a PeftModel inside a PeftModel" if wrappers > 1 else None


def idle_adapter(run: Run) -> str | None:
    """Of several adapters, the last one was made for training and is frozen, or one made for inference trains.

    What it was made for is its config's `inference_mode`. "ref" may stand still: TRL keeps a reference model so.
    """
    wrong = []
    for name, config in run.configs.items():
        mine = [p.requires_grad for key, p in run.parameters.items() if f".{name}." in f"{key}." and _in_adapter(key)]
        if mine and any(mine) and config.inference_mode:
            wrong.append(f"{name!r} was loaded for inference, and trains")
        elif mine and not any(mine) and not config.inference_mode and name == [*run.configs][-1] != "ref":
            wrong.append(f"{name!r}, the last, is frozen")
    return f"of {len(run.configs)} adapters, {' and '.join(wrong)}" if wrong and len(run.configs) > 1 else None


def partial_targets(run: Run) -> str | None:
    """A name in a LoraConfig's `target_modules` is the end of no adapted layer's name."""
    unmatched: set[str] = set()
    for config in _lora_configs(run):
        if config.target_modules and not isinstance(config.target_modules, str):
            unmatched |= {t for t in config.target_modules if not _ends(run.layers, t)}
    return f"target_modules has names that matched no layer: {_listed(sorted(unmatched))}" if unmatched else None


def unmatched_settings(run: Run) -> str | None:
    """Another setting of a LoraConfig matched nothing, by PEFT's own rules: it has no effect.

    Of a regular expression, each alternative must match a layer.
    """
    names = {_base_name(name) for name, _ in run.model.named_modules()}
    saved = {_base_name(name.partition(".modules_to_save.")[0]) for name in run.parameters if "modules_to_save" in name}
    dead: list[str] = []
    for config in _lora_configs(run):
        targets, excluded = config.target_modules, config.exclude_modules or []
        if isinstance(targets, str) and targets != "all-linear":
            dead += [f"target_modules {part!r}" for part in _dead_alternatives(targets, run.layers)]
        for setting in ("rank_pattern", "alpha_pattern"):
            used = {_first_key(getattr(config, setting), layer) for layer in run.layers}
            dead += [f"{setting} {key!r}" for key in getattr(config, setting) if key not in used]
        if isinstance(excluded, str):
            dead += [] if _fully(excluded, names) else [f"exclude_modules {excluded!r}"]
        else:
            dead += [f"exclude_modules {name!r}" for name in excluded if not _ends(names, name)]
        chosen = config.layers_to_transform or []
        indices = [chosen] if isinstance(chosen, int) else chosen
        dead += [f"layers_to_transform {i}" for i in indices if not any(f".{i}." in f".{x}." for x in run.layers)]
        dead += [f"modules_to_save {name!r}" for name in config.modules_to_save or [] if not _ends(saved, name)]
        parameters = getattr(config, "target_parameters", None) or []
        dead += [f"target_parameters {name!r}" for name in parameters if not _ends(run.layers, name)]
    return f"a setting matched nothing: {_listed(sorted(dead))}" if dead else None


def tied_target(run: Run) -> str | None:
    """The output layer is adapted, and its weight is the embedding's too: a merge would change both."""
    head = run.model.get_output_embeddings() if hasattr(run.model, "get_output_embeddings") else None
    base = getattr(head, "base_layer", None)
    if base is None or any(getattr(config, "ensure_weight_tying", False) for config in run.configs.values()):
        return None
    uses = [name for name, p in run.model.named_parameters(remove_duplicate=False) if p is base.weight]
    return f"an adapter is on a weight that has two uses: {_listed(uses)}" if len(uses) > 1 else None


def adapter_not_loaded(run: Run) -> str | None:
    """The adapter's file is empty or all zero, or has names that the model does not have."""
    if run.folder is None:
        return None
    path = Path(run.folder) / "adapter_model.safetensors"
    tensors = load_file(path)
    if not any(tensor.any() and tensors.get(_other_half(name), tensor).any() for name, tensor in tensors.items()):
        return f"{path} has {len(tensors)} tensors, and no update in them"
    adapters = "|".join(map(re.escape, run.configs))  # the file's names are without the adapter's own
    here = {re.sub(rf"\.({adapters})(?=\.|$)", "", name) for name in run.adapter}
    strange = [name for name in tensors if name not in here and _in_adapter(name)]
    return f"{path} has names that are not in the model: {_listed(strange)}" if strange else None


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


def rows_without_labels(run: Run) -> str | None:
    """Some rows have no label that counts, and others have: these teach nothing."""
    labels = run.batch.get("labels")
    if labels is None or not label_tokens(labels):
        return None
    empty = [str(row) for row, count in enumerate((labels[:, 1:] != IGNORE_INDEX).sum(dim=1).tolist()) if not count]
    return f"{len(empty)} of {len(labels)} rows of the batch have no label: {_listed(empty)}" if empty else None


def shifted_labels(run: Run) -> str | None:
    """The labels are the next token's already, and the model shifts them again: it learns the next but one."""
    wrong, following = run.wrong_labels
    if not wrong or following <= wrong / 2:
        return None
    return f"{wrong} labels are not the token at their place, and {following} are the next one"


def mismatched_labels(run: Run) -> str | None:
    """A label is another token than the one at its place, and not the next one."""
    wrong, following = run.wrong_labels
    if not wrong or following > wrong / 2:
        return None
    return f"{wrong} labels are another token than the input at their place"


def padding_as_labels(run: Run) -> str | None:
    """A label counts where the attention mask is 0."""
    labels, ids = run.batch.get("labels"), run.batch.get("input_ids")
    if labels is None or ids is None or labels.shape != ids.shape:
        return None
    padded = int(((labels != IGNORE_INDEX) & ~run.attended).sum())
    return f"{padded} labels are padding, and teach the model to write it" if padded else None


def eos_not_learned(run: Run) -> str | None:
    """An EOS directly follows a label, but no EOS in the batch is a label: the model does not learn to stop.

    EOS is what the model's config or generation config says, or the token, not a label itself, that
    ends all rows of the batch. Padding (attention mask 0) and an EOS inside a prompt do not count,
    nor do rows without one.
    """
    eos, is_label = _eos_ids(run.model), run.labelled
    if is_label is None or not eos or not label_tokens(run.batch["labels"]):
        return None
    ids = run.batch["input_ids"]  # (batch, T)
    last = run.attended & ~torch.nn.functional.pad(run.attended[:, 1:], (0, 1))  # (batch, T): the end of each row
    ending = set(ids[last].tolist())
    if len(ids) > 1 and len(ending) == 1 and not is_label[last].any():
        eos |= ending
    is_eos = torch.isin(ids, torch.tensor(sorted(eos), device=ids.device))
    ends = is_eos[:, 1:] & run.attended[:, 1:] & is_label[:, :-1]  # (batch, T - 1): the end of a text that is learned
    if not ends.any() or (is_eos[:, 1:] & is_label[:, 1:]).any():
        return None
    return f"{int(ends.sum())} learned texts end with EOS, and in none of them is it a label"


def eos_of_two_minds(run: Run) -> str | None:
    """All completions end with the same token as a label, and the model would not stop at it when it generates."""
    stops, tails = _stops(run.model), run.last_two  # (completions, 2)
    if stops is None or tails is None or len(tails) < 2 or len(tails[:, 1].unique()) > 1 or _ended(tails, stops).any():
        return None
    places = {"config": run.model.config, "generation_config": getattr(run.model, "generation_config", None)}
    says = [f"{place}'s eos_token_id is {getattr(holder, 'eos_token_id', None)}" for place, holder in places.items()]
    return f"the labels end with token {int(tails[0, 1])}, and the model's {', its '.join(says)}"


def completion_cut(run: Run) -> str | None:
    """A completion, its prompt masked, ends without EOS: it was cut, or nobody added one."""
    stops, tails = _stops(run.model), run.last_two
    if not stops or tails is None or eos_of_two_minds(run):  # the one or the other
        return None
    cut = int((~_ended(tails, stops)).sum())
    return f"{cut} of {len(tails)} completions end without EOS" if cut else None


def untrained_tokens(run: Run) -> str | None:
    """Labels are new tokens: their rows of the embedding are frozen, and are still the mean of all (or zero).

    So `resize_token_embeddings` makes them, up to a tiny noise. With `mean_resizing=False` they are not known here.
    """
    labels = run.batch.get("labels")
    embedding = run.model.get_input_embeddings() if hasattr(run.model, "get_input_embeddings") else None
    weight = getattr(embedding, "weight", None)
    if labels is None or weight is None or weight.requires_grad or not isinstance(embedding, nn.Embedding):
        return None
    ids = labels[labels != IGNORE_INDEX].unique().to(weight.device)
    mean, some = weight.mean(dim=0, dtype=torch.float32), weight[:: max(1, len(weight) // 1024)]
    usual = (some - mean).norm(dim=1).median()  # of about a thousand rows, since a float32 copy of all is large
    new = [str(token) for token in ids[(weight[ids] - mean).norm(dim=1) < 0.05 * usual].tolist()]
    return f"these labels have frozen embeddings that were never trained: tokens {_listed(new)}" if new else None


def no_gradient(run: Run) -> str | None:
    """A trainable parameter gets no gradient; one of several experts need not, if the router sent it no token."""
    routed = {EXPERT.sub(".experts.", name) for name, state in run.gradients.items() if state in ("ok", "zero")}
    none = [name for name, state in run.gradients.items() if state == "no gradient"]
    none = [name for name in none if not EXPERT.search(name) or EXPERT.sub(".experts.", name) not in routed]
    return f"trainable, but the loss sends no gradient to {_listed(none)}" if none else None


def zero_gradient(run: Run) -> str | None:
    """The gradient is exactly zero.

    Expected for lora_A while lora_B is zero, as at the default init (LoRA, section 4.1), since
    dL/dA = scaling * B^T (dL/dh) x^T: one half may wait for the other, but not if both are zero.
    """
    zero = [name for name, state in run.gradients.items() if state == "zero"]
    zero = [name for name in zero if not _waits_for_partner(name, run)]
    return f"the gradient is exactly zero for {_listed(zero)}" if zero else None


def non_finite_gradient(run: Run) -> str | None:
    """The gradient has an inf or a NaN."""
    broken = [name for name, state in run.gradients.items() if state == "non-finite"]
    return f"the gradient has inf or NaN for {_listed(broken)}" if broken else None


MODEL_CHECKS = (
    no_trainable_parameters, base_trainable, low_precision_adapter, nested_adapter, idle_adapter, partial_targets,
    unmatched_settings, tied_target, adapter_not_loaded, checkpointing_inactive, packed_for_inference,
)  # fmt: skip
OPTIMIZER_CHECKS = (not_in_optimizer, lr_zero)
BATCH_CHECKS = (
    no_labels, rows_without_labels, shifted_labels, mismatched_labels, padding_as_labels, eos_not_learned,
    eos_of_two_minds, completion_cut,
)  # fmt: skip
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


def _waits_for_partner(name: str, run: Run) -> bool:
    """Return whether this is one part of an adapter whose other part is still zero but can learn.

    In LoRA that is the other half, and this one must not be zero itself. The parts of other methods (VeRA, LoHa, LoKr,
    RandLoRA) wait for a part of the same layer that is zero and gets a gradient.
    """
    other = _other_half(name)
    if other != name and other in run.parameters:
        partner = run.parameters[other]
        return bool(run.parameters[name].any() and not partner.any() and partner.requires_grad)
    layer = f"{name.rsplit('.', 2)[0]}."
    parts = [part for part in run.trainable if part.startswith(layer) and part != name]
    return any(run.gradients[part] == "ok" and not run.parameters[part].any() for part in parts)


def _other_half(name: str) -> str:
    """Return the name of the other half of an adapter; of a parameter that is no half, its own."""
    return HALF.sub(lambda half: half[1] + ("B" if half[2] == "A" else "A"), name)


def _lora_configs(run: Run) -> list:
    configs = [config for config in run.configs.values() if run.adapter]
    return [config for config in configs if str(getattr(config, "peft_type", "")).rpartition(".")[2] == "LORA"]


def _base_name(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _layer(name: str) -> str:
    """Return the base's name of the layer that a parameter or module of an adapter belongs to."""
    return _base_name(re.sub(r"(\.base_layer)+$", "", name.partition(".lora_")[0]))


def _ends(names: Collection[str], wanted: str) -> bool:
    return any(f".{name}".endswith(f".{wanted}") for name in names)


def _fully(regex: str, names: Collection[str]) -> bool:
    return any(re.fullmatch(regex, name) for name in names)


def _first_key(pattern: Mapping[str, object], layer: str) -> str | None:
    """Return the key that PEFT takes for a layer (`get_pattern_key` in peft.utils.other): the first that matches."""
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", layer)), None)


def _dead_alternatives(regex: str, names: Collection[str]) -> list[str]:
    """Return each "a" and "b" of "a|b" in a regular expression that takes part in no match; or the whole, if none is.

    An alternative takes part if a group around it, named probe, has matched something.
    """
    flags = re.match(r"(\(\?[aiLmsux]+\))?", regex)  # these may stand at the beginning only
    opened = [[flags.end() if flags else 0]]  # of each open group: its start and the places of its bars
    groups: list[list[int]] = []
    plain = re.sub(r"\\.|\[[^]]*\]", lambda part: "_" * len(part[0]), regex)  # no bar or bracket in it is one
    for place, sign in enumerate(plain[opened[0][0] :], start=opened[0][0]):
        if sign == "(":
            opened.append([place + 1 + (2 if plain.startswith("?:", place + 1) else 0)])
        elif sign == "|":
            opened[-1].append(place)
        elif sign == ")":
            groups.append([*opened.pop(), place])
    groups = [group for group in groups if len(group) > 2 and plain[group[0]] != "?"]  # no look-ahead, no named group
    dead = []
    for start, *bars, end in [*groups, [*opened.pop(), len(regex)]]:
        for left, right in pairwise([start - 1, *bars, end]):
            probe = re.compile(f"{regex[: left + 1]}(?P<probe>{regex[left + 1 : right]}){regex[right:]}")
            if not any(match["probe"] is not None for match in map(probe.fullmatch, names) if match):
                dead.append(regex[left + 1 : right])
    return dead


def _stops(model: nn.Module) -> set[int] | None:
    """Return the tokens at which `generate` stops; None for a model that has no config."""
    if getattr(model, "config", None) is None:
        return None
    return token_ids((getattr(model, "generation_config", None) or model.config).eos_token_id)


def _ended(tails: torch.Tensor, stops: Collection[int]) -> torch.Tensor:
    """Return which completions have a stop among their last two tokens (a line break may follow it), (completions,)."""
    return torch.isin(tails, torch.tensor(sorted(stops), device=tails.device, dtype=tails.dtype)).any(dim=1)


def _in_adapter(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def _eos_ids(model: nn.Module) -> set[int]:
    holders = (getattr(model, name, None) for name in ("config", "generation_config"))
    return set().union(*(token_ids(getattr(holder, "eos_token_id", None)) for holder in holders))


def _listed(names: list[str]) -> str:
    """Return "a, b, c and 11 more"."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
