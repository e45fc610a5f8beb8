"""The learning-rate runs of notebook 06: what a run is, how one is trained, and the stored results.

The runs are data: `PARTS` names the questions, and for each the runs that answer it; `train_once` does one of them with
the real Trainer. `python -m helpers.makers.sweep_learning_rate` has done them all.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

from helpers import data, evaluation, models, training
from helpers.hardware import profile
from helpers.loss import token_loss_sum

import pandas as pd
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Trainer, set_seed

RESULTS = Path(__file__).parents[1] / "assets" / "learning_rate"
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
ALLOWED = {"method": ("lora", "full"), "base": ("pretrained", "untrained"), "schedule": tuple(SCHEDULES)}


@dataclass(frozen=True)
class Run:
    """One training run on the sample task. Two runs with equal fields are the same run.

    `method` is "lora" or "full" (which has r = 0, alpha = 0 and targets "everything"). The scaling is alpha / r, or
    alpha / sqrt(r) with `rslora`; `targets` is "all-linear", or names of modules joined by "+". `learning_rate` is the
    peak of `schedule` ("linear", "cosine" or "constant"), `warmup` a share of the steps, and `seed` that of the
    adapter and of the order of the rows. `base` is "pretrained", or "untrained": tiny with random weights.
    """

    model: str = "tiny"
    method: str = "lora"
    learning_rate: float = 1e-3
    seed: int = 0
    r: int = 16
    alpha: float = 32.0
    rslora: bool = False
    targets: str = "all-linear"
    warmup: float = 0.1
    schedule: str = "cosine"
    batch_size: int = 8
    steps: int = 60
    base: str = "pretrained"


def _vary(run: Run, **choices: Sequence[Any]) -> list[Run]:
    return [replace(run, **dict(zip(choices, chosen, strict=True))) for chosen in product(*choices.values())]


LORA, FULL = Run(), Run(method="full", r=0, alpha=0.0, targets="everything")
SMOLLM2, SMOLLM2_FULL = (replace(run, model="smollm2-135m", steps=30) for run in (LORA, FULL))
QV = replace(LORA, targets="q_proj+v_proj")
QV_80 = replace(QV, r=80, alpha=160.0)  # as many trainable parameters as r = 16 on all linear layers of tiny
# For each rank, scalings alpha / r: 2 (alpha = 2r), 32 / r (alpha fixed), 8 / sqrt(r) (as rsLoRA), and others.
SCALINGS = {1: (2, 8, 32), 4: (2, 4, 8), 16: (0.5, 2, 8), 64: (0.5, 1, 2)}
BATCHES = [replace(LORA, batch_size=size, steps=480 // size) for size in (4, 8, 16, 32)]  # the same 480 rows
PARTS: dict[str, list[Run]] = {
    "rates": [  # more seeds near the optima
        *_vary(LORA, learning_rate=(1e-4, 2e-4, 5e-4, 5e-2), seed=range(3)),
        *_vary(LORA, learning_rate=(1e-3, 2e-3, 3e-3, 5e-3, 7e-3, 1e-2, 1.5e-2, 2e-2), seed=range(5)),
        *_vary(FULL, learning_rate=(1e-5, 2e-5, 5e-5, 1e-4, 1e-2, 2e-2), seed=range(3)),
        *_vary(FULL, learning_rate=(2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 5e-3), seed=range(5)),
    ],
    "rank": [
        replace(LORA, r=r, alpha=r * scaling, learning_rate=rate)
        for r, scalings in SCALINGS.items()
        for scaling, rate in product(scalings, (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2))
    ],
    "targets": [
        *_vary(QV, learning_rate=(1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 3e-2, 5e-2, 1e-1), seed=range(3)),
        *_vary(QV_80, learning_rate=(2e-3, 5e-3, 1e-2, 2e-2, 3e-2), seed=range(2)),
    ],
    "untrained": [
        *_vary(replace(LORA, base="untrained"), learning_rate=(1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2), seed=range(2)),
        *_vary(replace(FULL, base="untrained"), learning_rate=(5e-4, 1e-3, 2e-3, 5e-3, 1e-2), seed=range(2)),
    ],
    "steps": [
        *_vary(replace(LORA, steps=15), learning_rate=(2e-3, 5e-3, 1e-2, 1.5e-2, 2e-2, 5e-2), seed=range(2)),
        *_vary(replace(FULL, steps=15), learning_rate=(5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2), seed=range(2)),
        *_vary(replace(LORA, steps=240), learning_rate=(5e-4, 1e-3, 2e-3, 5e-3, 1e-2), seed=range(2)),
        *_vary(replace(FULL, steps=240), learning_rate=(1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3), seed=range(2)),
    ],
    "schedule": _vary(
        LORA, learning_rate=(5e-3, 1.5e-2), seed=range(2), warmup=(0.0, 0.03, 0.1), schedule=tuple(SCHEDULES)
    ),
    "batch": [
        *(run for b in BATCHES for run in _vary(b, learning_rate=(1e-3, 2e-3, 5e-3, 1e-2, 2e-2), seed=range(2))),
        *_vary(LORA, batch_size=(4, 16, 32), learning_rate=(2e-3, 5e-3, 1e-2)),  # the same 60 steps
    ],
    "smollm2": [
        *_vary(SMOLLM2, learning_rate=(2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)),
        *_vary(SMOLLM2_FULL, learning_rate=(2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3)),
    ],
}


def build(run: Run, output_dir: str | Path) -> Trainer:
    """Return the Trainer of a run, ready for `train()`: 400 rows of the sample task, float32, nothing printed.

    The optimizer is the Trainer's AdamW without weight decay, and gradients are clipped at norm 1, its default.

    Raises:
        ValueError: a field of the run has no such value.
    """
    for name, allowed in ALLOWED.items():
        if getattr(run, name) not in allowed:
            raise ValueError(f"{name}={getattr(run, name)!r}: choose one of {', '.join(allowed)}")
    set_seed(run.seed)
    tokenizer, rows = _training_rows(run.model)
    arguments = training.training_arguments(
        output_dir,
        learning_rate=run.learning_rate,
        lr_scheduler_type=SCHEDULES[run.schedule],
        warmup_steps=round(run.warmup * run.steps),
        max_steps=run.steps,
        per_device_train_batch_size=run.batch_size,
        seed=run.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is not a number is logged as such
        fp16=False,
        bf16=False,
    )
    trainer = training.build_trainer(_model(run), arguments, tokenizer, rows)
    trainer.remove_callback(training.LossLines)
    return trainer


def train_once(run: Run) -> dict[str, Any]:
    """Train, and measure the loss on the sample task's validation split.

    Returns:
        `validation_loss`, in nats per completion token; `base_text_loss`, see there (None for other models than tiny);
        `losses`, the training loss of every step; `diverged`, true if the validation loss is not finite or above the
        training loss of the first step. A loss that is not finite is None.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(run, folder)
        trainer.train()
    losses = [_rounded(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry]
    tokenizer = trainer.processing_class
    loss = _rounded(evaluation.completion_loss(trainer.model, tokenizer, data.load_commands("validation")))
    return {
        "validation_loss": loss,
        "base_text_loss": base_text_loss(trainer.model, tokenizer) if run.model == "tiny" else None,
        "diverged": loss is None or losses[0] is None or loss > losses[0],
        "losses": losses,
    }


@torch.no_grad()
def text_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> float:
    """Return the mean negative log-likelihood per token of plain texts, in nats, each between two EOS.

    The texts are scored one at a time. The model's train or eval mode is restored.
    """
    total, tokens = 0.0, 0
    was_training = model.training
    model.eval()
    try:
        for text in texts:
            ids = [tokenizer.eos_token_id, *tokenizer(text).input_ids, tokenizer.eos_token_id]
            batch = {"input_ids": torch.tensor([ids], device=model.device)}  # (1, tokens)
            total += token_loss_sum(model, batch | {"labels": batch["input_ids"]}).item()
            tokens += len(ids) - 1  # nothing predicts the first
    finally:
        model.train(was_training)
    return total / tokens


def base_text_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float | None:
    """Return tiny's loss in nats per token on 100 documents of held-out pretraining text; None if it is not finite."""
    lines = (RESULTS / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    return _rounded(text_loss(model, tokenizer, [json.loads(line) for line in lines]))


def _rounded(loss: float, digits: int = 6) -> float | None:
    return round(loss, digits) if math.isfinite(loss) else None


@lru_cache
def _training_rows(model: str) -> tuple[PreTrainedTokenizerBase, Dataset]:
    tokenizer = models.load_tokenizer(model)
    return tokenizer, data.encode(data.load_commands("train"), tokenizer)


def _model(run: Run) -> PreTrainedModel:
    if run.base == "untrained":
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(models.TINY)).to(profile().device)
    else:
        model = models.load_base(run.model, dtype=torch.float32)
    if run.method == "full":
        return model
    targets = run.targets if run.targets == "all-linear" else run.targets.split("+")
    scaling = {"r": run.r, "lora_alpha": run.alpha, "use_rslora": run.rslora}
    return get_peft_model(model, LoraConfig(**scaling, target_modules=targets, task_type="CAUSAL_LM"))


def load_runs(part: str, folder: Path = RESULTS) -> pd.DataFrame:
    """Return the stored runs of one part: a row a run, with the fields of `Run` and what `train_once` returned.

    Raises:
        ValueError: there is no such part in `PARTS`, or a run of it is not in the folder's `runs.jsonl`.
    """
    wanted, rows = runs_of([part]), read_stored(folder)
    missing = [run for run in wanted if run not in rows]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(wanted)} runs of {part!r} are not in {folder / 'runs.jsonl'}; "
            f"run `python -m helpers.makers.sweep_learning_rate --part {part}`"
        )
    return pd.DataFrame([rows[run] for run in wanted]).astype({"validation_loss": float, "base_text_loss": float})


def runs_of(parts: Sequence[str]) -> list[Run]:
    """Return the runs of some parts of `PARTS`, each once."""
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"part={part!r} does not exist; choose among {', '.join(PARTS)}")
    return list(dict.fromkeys(run for part in parts for run in PARTS[part]))


def read_stored(folder: Path) -> dict[Run, dict[str, object]]:
    """Return the stored runs with their settings and results; none where there is no `runs.jsonl`."""
    file = folder / "runs.jsonl"
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines()) if file.exists() else []
    return {Run(**{field.name: row[field.name] for field in fields(Run)}): row for row in rows}
