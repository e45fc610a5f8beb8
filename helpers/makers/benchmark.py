"""Ways to train one adapter, timed side by side: `python -m helpers.makers.benchmark` writes the record in assets.

Each recipe fine-tunes smollm2-135m on the sample task with the Trainer, in a thread of its own. The threads take
turns, one step each, so that whatever else the machine does slows all of them alike: what is reported are ratios.
Recipes that answer how well the model learns take all steps and are evaluated; the others take a few. TRL's
`SFTTrainer` takes part if TRL is installed (`pip install "trl>=1.0"`). Notebook 09 draws the result.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import threading
import time
import warnings
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from helpers import data, evaluation, models, training
from helpers.finetune.folders import atomic_write_text

import datasets
import torch
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainerCallback, set_seed

RECORD = Path(__file__).parents[1] / "assets" / "benchmark" / "record.json"
MODEL = "smollm2-135m"
BATCH_SIZE = 8
GROUP = 12  # batches; from transformers' get_length_grouped_indices for 400 rows
PACKAGES: tuple[str, ...] = ("torch", "transformers", "peft", "accelerate")
# By name, since PEFT refuses `layers_to_transform` together with "all-linear".
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Recipe:
    """One way to train. Unless it says otherwise, it is the Trainer's plain way with LoRA on all linear layers.

    Attributes:
        name: what the record calls it.
        grouped: batches of rows of similar length.
        labels_only: logits only in columns that have a label.
        bf16: products in bfloat16, by autocast; weights, adapter and optimizer stay in float32.
        last_third: adapters in the last third of the layers only.
        targets: names of the layers that get an adapter.
        rank: of the adapter; alpha is twice that.
        learning_rate: at its highest.
        checkpointing: compute each layer again in the backward pass. For TRL, None leaves its default, which is True.
        trl: with TRL's SFTTrainer.
        full_run: take all steps and evaluate; otherwise a few steps, for the time.
    """

    name: str
    grouped: bool = False
    labels_only: bool = False
    bf16: bool = False
    last_third: bool = False
    targets: tuple[str, ...] = ALL_LINEAR
    rank: int = 8
    learning_rate: float = 1e-3
    checkpointing: bool | None = False
    trl: bool = False
    full_run: bool = False


FASTER = Recipe("grouped, labels only", grouped=True, labels_only=True, full_run=True)
RECIPES: tuple[Recipe, ...] = (
    Recipe("plain", full_run=True),
    FASTER,
    replace(FASTER, name="the same, bfloat16", bf16=True),
    # As many parameters as with rank 8 in all layers. The learning rate was chosen on the validation split.
    replace(FASTER, name="the same, last third", last_third=True, rank=24, learning_rate=3e-3),
    Recipe("TRL", trl=True, checkpointing=None, full_run=True),
    Recipe("TRL, no checkpointing", trl=True),
    Recipe("grouped by length", grouped=True),
    Recipe("logits for labels only", labels_only=True),
    Recipe("adapters on q and v", targets=("q_proj", "v_proj")),
    Recipe("checkpointing", checkpointing=True),
)


class _Turns(TrainerCallback):
    """Wait for a turn before each step, and send its seconds after it."""

    def __init__(self, parent: Connection) -> None:
        self.parent = parent

    def on_train_begin(self, *_: object, **__: object) -> None:
        self.parent.send("ready")

    def on_step_begin(self, *_: object, **__: object) -> None:
        self.parent.recv()
        self.start = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        self.parent.send(time.perf_counter() - self.start)


def build(recipe: Recipe, model: Any, tokenizer: Any, steps: int, output_dir: str) -> Trainer:
    """Return a recipe's trainer, on the CPU, with weights in float32.

    Args:
        recipe: one of RECIPES.
        model: the base model, which gets the adapter.
        tokenizer: the model's.
        steps: of training, for the schedule.
        output_dir: for the trainer; nothing is saved.
    """
    depth = model.config.num_hidden_layers
    layers = list(range(depth - depth // 3, depth)) if recipe.last_third else None
    options = {"r": recipe.rank, "lora_alpha": 2 * recipe.rank, "task_type": "CAUSAL_LM"}
    lora = LoraConfig(target_modules=list(recipe.targets), layers_to_transform=layers, **options)
    settings: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": BATCH_SIZE,
        "learning_rate": recipe.learning_rate,
        "bf16": recipe.bf16,
        "logging_steps": steps + 1,
    }
    if recipe.checkpointing is not None:
        settings["gradient_checkpointing"] = recipe.checkpointing
    if recipe.trl:
        import trl

        plain = training.training_arguments(output_dir)
        same = ("lr_scheduler_type", "warmup_steps", "save_strategy", "report_to", "use_cpu", "disable_tqdm")
        settings |= {name: getattr(plain, name) for name in same}
        arguments = trl.SFTConfig(output_dir=output_dir, dataloader_pin_memory=False, **settings)
        given = {"model": model, "processing_class": tokenizer, "peft_config": lora}
        return trl.SFTTrainer(args=arguments, train_dataset=data.load_commands("train"), **given)
    if recipe.grouped:
        settings["train_sampling_strategy"] = "group_by_length"
    arguments = training.training_arguments(output_dir, **settings)
    collator = data.LogitsToKeepCollator(tokenizer) if recipe.labels_only else DataCollatorForSeq2Seq(tokenizer)
    return Trainer(
        model=get_peft_model(model, lora), args=arguments, data_collator=collator, processing_class=tokenizer,
        train_dataset=data.encode(data.load_commands("train"), tokenizer),
    )  # fmt: skip


def _run(recipe: Recipe, model: Any, tokenizer: Any, steps: int, test_rows: int, parent: Connection) -> None:
    """In a thread of its own: train, a step for each turn that the parent gives, and send what came of it."""
    with parent, tempfile.TemporaryDirectory() as folder:  # an error closes the connection
        set_seed(0)
        trainer = build(recipe, model, tokenizer, steps, folder)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Turns(parent))
        trainer.train()
        parent.recv()
        result = {"adapter_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)}
        if recipe.full_run:
            trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # evaluated without autocast
            test = data.load_commands("test")
            result["test_loss"] = evaluation.completion_loss(trainer.model, tokenizer, test)
            chosen = test.select(range(test_rows))
            result["exact_match"] = evaluation.exact_match(trainer.model, tokenizer, chosen).score
        parent.send(result)


def run(recipes: tuple[Recipe, ...], steps: int, few_steps: int, test_rows: int) -> list[dict[str, Any]]:
    """Train with each recipe, in turns, and return for each its settings, the seconds of its steps and its results.

    Args:
        recipes: the first of them is what the others are compared with.
        steps: for recipes that go to the end.
        few_steps: for the others.
        test_rows: rows of the test split that are generated for exact match; the loss is that of the whole split.

    Raises:
        RuntimeError: a recipe ended early; its traceback is on stderr.
    """
    tokenizer = models.load_tokenizer(MODEL)
    base = models.load_base(MODEL, dtype=torch.float32, device="cpu")
    shared = {id(parameter): parameter for parameter in base.parameters()}  # frozen, so that all can have the same
    length = {recipe: steps if recipe.full_run else few_steps for recipe in recipes}
    records: dict[Recipe, dict[str, Any]] = {recipe: asdict(recipe) | {"seconds": []} for recipe in recipes}
    turns: dict[Recipe, Connection] = {}
    threads: list[threading.Thread] = []
    try:
        for recipe in recipes:
            turns[recipe], end = multiprocessing.Pipe()
            model = copy.deepcopy(base, dict(shared))
            arguments = (recipe, model, tokenizer, length[recipe], test_rows, end)
            threads.append(threading.Thread(target=_run, args=arguments, daemon=True))
            threads[-1].start()
            turns[recipe].recv()  # one starts after the other
            print(f"\r{len(turns)} of {len(recipes)} recipes are ready", end="", flush=True)
        print()
        for turn in range(steps + 1):
            for recipe, connection in turns.items():
                if turn < length[recipe]:
                    connection.send("step")
                    records[recipe]["seconds"].append(connection.recv())
                elif turn == steps:
                    connection.send("evaluate")
                    records[recipe] |= connection.recv()
            print(f"\rstep {min(turn + 1, steps)} of {steps}", end="\n" * (turn == steps), flush=True)
    except (EOFError, BrokenPipeError) as error:
        raise RuntimeError(f"the thread of recipe {recipe.name!r} ended early") from error
    for thread in threads:
        thread.join()
    return list(records.values())


def speedups(records: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return how many times faster than the first recipe each is: in all its steps together, and as a median of turns.

    Args:
        records: from `run`. A recipe of few steps is compared with as many of the first one's. Of more steps, only
            whole groups count: `group_by_length` sorts within groups of GROUP batches, the longest first.
    """
    found = {}
    for record in records:
        seconds = record["seconds"]
        pairs = list(zip(records[0]["seconds"], seconds, strict=False))[: len(seconds) // GROUP * GROUP or None]
        found[record["name"]] = (
            sum(ours for ours, _ in pairs) / sum(theirs for _, theirs in pairs),
            statistics.median(ours / theirs for ours, theirs in pairs),
        )
    return found


def main() -> None:
    """Run all recipes, store the record, and print how much faster than the plain way each is."""
    parser = argparse.ArgumentParser(prog="python -m helpers.makers.benchmark", description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=3 * GROUP)
    parser.add_argument("--few-steps", type=int, default=GROUP)
    parser.add_argument("--test-rows", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RECORD)
    options = parser.parse_args()
    os.environ["LORA_LAB_DEVICE"] = "cpu"
    warnings.simplefilter("ignore", FutureWarning)  # gradient_checkpointing has a new name in transformers 5.23
    datasets.disable_progress_bars()
    recipes, packages = RECIPES, PACKAGES
    if importlib.util.find_spec("trl"):
        packages = (*packages, "trl")
    else:
        print('TRL is left out: it is not installed (pip install "trl>=1.0")')
        recipes = tuple(recipe for recipe in recipes if not recipe.trl)
    records = run(recipes, options.steps, options.few_steps, options.test_rows)
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "versions": {package: version(package) for package in packages},
        "settings": {"model": MODEL, "batch_size": BATCH_SIZE}
        | {name: getattr(options, name) for name in ("steps", "few_steps", "test_rows")},
        "speed": speedups(records),
        "recipes": records,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(options.out, json.dumps(found, indent=1) + "\n")
    for name, (total, median) in found["speed"].items():
        print(f"{name:24} {total:.2f}x in all steps, {median:.2f}x as the median of turns")


if __name__ == "__main__":
    main()
