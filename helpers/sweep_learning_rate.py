"""The learning-rate sweep behind notebook 06: `python -m helpers.sweep_learning_rate [--part NAME]`.

The runs are data: `PARTS` names the questions, and for each the runs that answer it; `train_once` does one of them with
the real Trainer. The results go to `runs.jsonl`, one JSON object a line, and `record.json` says with which versions and
on what kind of machine they were made. A run that is in the file is not repeated, so a stopped sweep can go on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from helpers import data, evaluation, models, pretrain_tiny, training
from helpers.folders import write_whole
from helpers.hardware import profile

import pandas as pd
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, set_seed

RESULTS = Path(__file__).parent / "assets" / "learning_rate"
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
        profile(),
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
    trainer = training.build_trainer(_model(run, tokenizer), arguments, tokenizer, rows)
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


def base_text_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float | None:
    """Return tiny's loss in nats per token on 100 documents of held-out pretraining text; None if it is not finite."""
    try:
        return _rounded(math.log(pretrain_tiny.held_out_perplexity(model, tokenizer, count=100)))
    except OverflowError:  # exp of a loss above 709 nats
        return None


def _rounded(loss: float, digits: int = 6) -> float | None:
    return round(loss, digits) if math.isfinite(loss) else None


@lru_cache
def _training_rows(model: str) -> tuple[PreTrainedTokenizerBase, Dataset]:
    tokenizer = models.load_tokenizer(model)
    return tokenizer, data.encode(data.load_commands("train"), tokenizer)


def _model(run: Run, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    if run.base == "untrained":
        model = pretrain_tiny.new_model(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
        model = model.to(profile().device)
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
    wanted, rows = _plan([part]), _read(folder)
    missing = [run for run in wanted if run not in rows]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(wanted)} runs of {part!r} are not in {folder / 'runs.jsonl'}; "
            f"run `python -m helpers.sweep_learning_rate --part {part}`"
        )
    return pd.DataFrame([rows[run] for run in wanted]).astype({"validation_loss": float, "base_text_loss": float})


def sweep(parts: Sequence[str], folder: Path) -> None:
    """Do the runs of the parts that are not in the folder yet. It is written after each, so a sweep can be stopped.

    Raises:
        ValueError: there is no such part in `PARTS`.
    """
    wanted, rows = _plan(parts), _read(folder)
    missing = [run for run in wanted if run not in rows]
    print(f"{len(missing)} of {len(wanted)} runs to do", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    record, started = folder / "record.json", time.perf_counter()
    sessions = json.loads(record.read_text(encoding="utf-8")) if record.exists() else []
    for number, run in enumerate(missing, start=1):
        rows[run] = asdict(run) | train_once(run)
        minutes = round((time.perf_counter() - started) / 60, 1)
        lines = [json.dumps(rows[run]) + "\n" for run in sorted(rows, key=astuple)]
        write_whole(folder / "runs.jsonl", "".join(lines))
        session = {"parts": list(parts), "runs": number, "minutes": minutes} | _circumstances()
        write_whole(record, json.dumps([*sessions, session], indent=1) + "\n")
        print(f"{number} of {len(missing)}, {minutes} min: loss {rows[run]['validation_loss']}, {run}", flush=True)


def _plan(parts: Sequence[str]) -> list[Run]:
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"part={part!r} does not exist; choose among {', '.join(PARTS)}")
    return list(dict.fromkeys(run for part in parts for run in PARTS[part]))


def _read(folder: Path) -> dict[Run, dict[str, object]]:
    file = folder / "runs.jsonl"
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines()) if file.exists() else []
    return {Run(**{field.name: row[field.name] for field in fields(Run)}): row for row in rows}


def _circumstances() -> dict[str, object]:
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{profile().device}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
    }


def main() -> None:
    """Run the sweep from the command line."""
    parser = argparse.ArgumentParser(description="Train at many learning rates and store the losses.")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="only this part; may be repeated")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of runs.jsonl, to make or to go on with")
    arguments = parser.parse_args()
    sweep(arguments.part or list(PARTS), arguments.output)


if __name__ == "__main__":
    main()
