"""Callbacks of the Trainer: one prints the loss, one watches a run for faults that raise no error."""

from __future__ import annotations

import functools
import json
import math
import random
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from helpers.diagnose import Finding, diagnose, diagnose_batch
from helpers.loss import label_tokens

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerState, TrainingArguments

REMEDIES = {
    "settings-ignored": "Start a new run from the weights alone, PeftModel.from_pretrained(base, checkpoint, "
    "is_trainable=True), or resume with the settings of the checkpoint.",
    "adapter-not-moving": "Keep the adapter in float32, and see that the optimizer holds it and that its rate is not "
    "a thousandth of what you meant.",
    "worse-than-guessing": "Lower the learning rate by factors of 3 to 10, and start again from the base.",
    "evaluated-in-train-mode": "Call model.eval() before an evaluation of your own and model.train() after it, or use "
    "Trainer.evaluate.",
    "evaluation-leak": "Take duplicates out before the split, or split by what must not be shared.",
}
UPDATES = 10  # after so many, the adapter must have moved
STUCK = 0.1  # the share of its entries that may not have


class DiagnosticsCallback(TrainerCallback):
    """Watch a run of the Trainer for faults that raise no error; pass it as `Trainer(callbacks=[…])`.

    It stops a run with FloatingPointError, before the update and before anything is saved, when the loss of a
    micro-batch or a gradient is not finite (the first in the backward pass is named, before clipping spreads it to
    all), or an update has made a weight inf or NaN, and it would now be saved.

    It warns, and keeps in `findings`, what `helpers.diagnose.diagnose` finds in the model, the optimizer and the first
    rows before the first step (not of a stream, which cannot be read twice), and in the labels of each micro-batch; and
    these of its own:
        settings-ignored: a resumed run uses the checkpoint's learning rate or weight decay, or another lora_alpha
        adapter-not-moving: after ten updates, a tenth of the adapter's entries that had a gradient are what they were
        worse-than-guessing: the logged loss began below ln(vocabulary size), that of a uniform guess, and is above it
        evaluated-in-train-mode: the model was called without gradients while its dropout was active
        evaluation-leak: rows of the evaluation data, token by token, are in the training data

    Training is not changed: the weights are bit by bit those of a run without it. It costs one forward and backward
    pass before the first step, a copy of the adapter for ten updates, and a look at the labels of each batch and at
    each gradient. A loss that is not the model's own (label smoothing, `compute_loss_func`) is not seen, its gradients
    are.
    """

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self._handles: list[Any] = []  # of the hooks
        self._start: dict[str, torch.Tensor] = {}  # the adapter before the first update
        self._seen: set[int] | None = None  # hashes of the training rows, made for the first evaluation

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        model, optimizer, train_dataloader = (kwargs[key] for key in ("model", "optimizer", "train_dataloader"))
        self._forget()
        self.findings, self._seen = [], None
        self._state, self._model, self._data = state, model, getattr(train_dataloader, "dataset", None)
        self._window: list[Mapping[str, Any]] = []  # the micro-batches of this update
        self._finite: dict[str, torch.Tensor] = {}  # of each gradient, in the order of the backward pass
        self._first_loss: float | None = None
        self._updates = 0
        model.train()  # as the Trainer does before each step
        found = diagnose(model, _first_batch(train_dataloader, args.per_device_train_batch_size), optimizer)
        for finding in found:
            self._report(finding.code, finding.message, finding.remedy)
        if state.global_step and (ignored := _ignored(args, state, model, optimizer)):
            self._report("settings-ignored", "; ".join(ignored))
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._start = {name: p.detach().clone() for name, p in trained.items() if "lora_" in name}
        self._had_gradient = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in self._start.items()}
        self._scaled = getattr(optimizer, "scaler", None) is not None
        self._handles = [model.register_forward_hook(self._see_loss, with_kwargs=True)]
        for name, parameter in trained.items():
            see = functools.partial(self._see_gradient, name)
            self._handles.append(parameter.register_post_accumulate_grad_hook(see))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._window.clear()

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        finite, self._finite = self._finite, {}
        # With fp16 on CUDA, GradScaler skips a step whose gradients are infinite: they are left to it.
        broken = [] if self._scaled else [name for name, value in finite.items() if not value]
        if broken:
            first = f"{broken[0]} is not finite, the first of {len(broken)} in the backward pass, of {len(finite)}"
            self._stop(f"the gradient of {first} in all; lower the learning rate, and look at these rows")

    on_substep_end = on_pre_optimizer_step  # after every other micro-batch of the update

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._updates += any(float(group["lr"]) > 0 for group in kwargs["optimizer"].param_groups)
        if self._updates == UPDATES:
            self._check_movement()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if "loss" not in (logs := kwargs["logs"] or {}):
            return
        self._first_loss = logs["loss"] if self._first_loss is None else self._first_loss
        vocabulary = getattr(getattr(kwargs["model"], "config", None), "vocab_size", None)
        if vocabulary and self._first_loss < (guess := math.log(vocabulary)) < logs["loss"]:
            loss = f"at step {state.global_step} the loss is {logs['loss']:.1f}"
            self._report("worse-than-guessing", f"{loss}, above that of a uniform guess, {guess:.1f}")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._seen is None:
            self._seen = set(map(hash, _ids(getattr(kwargs["train_dataloader"], "dataset", None))))
        known = [hash(ids) in self._seen for ids in _ids(getattr(kwargs["eval_dataloader"], "dataset", None))]
        if leaked := [number for number, seen in enumerate(known) if seen]:
            share = f"{len(leaked)} of {len(known)} evaluation rows"
            self._report("evaluation-leak", f"{share} are in the training data too: {_numbers(leaked)}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            self._check_weights()

    on_epoch_end = on_step_end  # save_strategy="epoch" asks for the save there

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if 2 <= self._updates < UPDATES:  # lora_A has no gradient in the first update
            self._check_movement()
        self._forget()
        self._check_weights()

    def _report(self, code: str, message: str, remedy: str = "") -> None:
        if code not in {finding.code for finding in self.findings}:
            self.findings.append(Finding(code, message, remedy or REMEDIES[code]))
            warnings.warn(f"{code}: {message}. {self.findings[-1].remedy}", stacklevel=3)

    def _see_loss(self, model: nn.Module, inputs: tuple, kwargs: Mapping[str, Any], output: Any) -> None:
        if not model.training:
            return
        if not torch.is_grad_enabled():
            active = [name for name, m in model.named_modules() if isinstance(m, nn.Dropout) and m.training and m.p > 0]
            if active:
                message = f"called without gradients, but with active dropout in {len(active)} layers"
                self._report(
                    "evaluated-in-train-mode", f"after update {self._state.global_step} the model was {message}"
                )
            return
        self._window.append(kwargs)
        for finding in diagnose_batch(model, kwargs) if kwargs.get("labels") is not None else []:
            place = f"update {self._state.global_step + 1}, micro-batch {len(self._window)}"
            self._report(finding.code, f"{place}: {finding.message}", finding.remedy)
        loss = getattr(output, "loss", None)
        if loss is None or loss.isfinite().all():
            return
        labels = kwargs.get("labels")
        broken = _not_finite(model)
        if labels is not None and not label_tokens(labels):
            why = "no label counts in it; see that truncation and masking leave part of each completion"
        elif broken:
            where = f"{len(broken)} parameters hold inf or NaN since the last update, the first is {broken[0]}"
            why = f"{where}; lower the learning rate"
        else:
            why = "every parameter is finite, so look at these rows, and at the largest number of the dtype in use"
        self._stop(f"the loss is {loss.item()}; {why}")

    def _see_gradient(self, name: str, parameter: nn.Parameter) -> None:
        self._finite[name] = parameter.grad.isfinite().all()
        if name in self._start:
            self._had_gradient[name] |= parameter.grad != 0

    def _check_weights(self) -> None:
        if broken := _not_finite(self._model):
            self._forget()
            where = f"{len(broken)} parameters hold inf or NaN, the first is {broken[0]}"
            raise FloatingPointError(f"after update {self._state.global_step}: {where}. Lower the learning rate.")

    def _check_movement(self) -> None:
        weights = dict(self._model.named_parameters())
        had, stuck = 0, 0
        for name, start in self._start.items():
            mask = self._had_gradient[name]
            had, stuck = had + int(mask.sum()), stuck + int((mask & (weights[name] == start)).sum())
        if stuck > STUCK * had:
            share = f"{stuck / had:.0%} of the adapter's entries that had a gradient"
            self._report(
                "adapter-not-moving",
                f"after {self._updates} updates at a rate above 0, {share} are bit by bit what they were",
            )
        self._start.clear()

    def _stop(self, what: str) -> None:
        place = f"update {self._state.global_step + 1}, micro-batch {len(self._window)}"
        if rows := _rows(self._window[-1], self._data) if self._window else []:
            place += f" (rows {_numbers(rows)} of the training data, counted from 0)"
        self._forget()
        raise FloatingPointError(f"{place}: {what}.")

    def _forget(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._start = {}


class LossLines(TrainerCallback):
    """Print "step 10 of 40: loss 0.52" at every log entry of the Trainer, and the loss of each evaluation."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if not state.is_world_process_zero or not logs:
            return
        per_token = "eval_loss_per_label_token"  # where compute_metrics returns it: "eval_loss" is a mean over batches
        for key, words in (("loss", "loss"), (per_token if per_token in logs else "eval_loss", "validation loss")):
            if key in logs:
                width = len(str(state.max_steps))
                print(f"step {state.global_step:{width}d} of {state.max_steps}: {words} {logs[key]:.2f}", flush=True)


def _first_batch(loader: DataLoader | None, size: int) -> dict[str, torch.Tensor] | None:
    """Return the first rows as the Trainer's collator makes them, without touching the sampler or random states."""
    dataset: Any = getattr(loader, "dataset", None)
    collate: Any = getattr(loader, "collate_fn", None)
    if not _indexable(dataset) or not collate:
        return None  # a stream cannot be read twice
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            batch = collate([dataset[i] for i in range(min(size, len(dataset)))])
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    return {key: value for key, value in batch.items() if torch.is_tensor(value)}


def _indexable(dataset: Any) -> bool:
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")


def _ids(dataset: Any) -> Iterator[tuple[int, ...]]:
    """Yield the token ids of each row; none where the rows have no ids, or come as a stream."""
    rows = (dataset[i] for i in range(len(dataset) if _indexable(dataset) else 0))
    return (tuple(torch.as_tensor(row["input_ids"]).tolist()) for row in rows if "input_ids" in row)


def _rows(batch: Mapping[str, torch.Tensor], dataset: Any) -> list[int]:
    """Return where in the dataset the rows of a batch are."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if ids is None:
        return []
    mask = torch.ones_like(ids) if mask is None or mask.shape != ids.shape else mask
    wanted = {tuple(row[kept.bool()].tolist()) for row, kept in zip(ids, mask, strict=True)}
    return [number for number, row in enumerate(_ids(dataset)) if row in wanted]


def _ignored(args: TrainingArguments, state: TrainerState, model: nn.Module, optimizer: Any) -> list[str]:
    """Say which settings a resumed run does not take from where one would think."""
    found = []
    for field, key in (("learning_rate", "initial_lr"), ("weight_decay", "weight_decay")):
        used = sorted({group[key] for group in optimizer.param_groups if key in group})
        used = used[-1:] if field == "weight_decay" else used  # the Trainer's group of biases and norms has 0 always
        if used and getattr(args, field) not in used:
            found.append(f"{field}={getattr(args, field):g} is not used, the checkpoint's {used[-1]:g} is")
    path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "adapter_config.json"
    config = getattr(model, "peft_config", {}).get("default")
    saved = json.loads(path.read_text(encoding="utf-8")) if config is not None and path.exists() else {}
    for field in ("lora_alpha", "use_rslora"):
        if field in saved and (value := getattr(config, field, None)) != saved[field]:
            found.append(f"{field}={value} is used, and the checkpoint was made with {saved[field]}")
    return found


def _not_finite(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if not p.isfinite().all()]


def _numbers(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:8])) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
