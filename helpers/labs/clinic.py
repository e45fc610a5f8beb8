"""The patients of notebook 10: nineteen runs of the Trainer that are broken and raise no error.

Each function returns a Trainer over `tiny` and the sample task that has not started. With `fixed=True` it returns the
same run without the fault, and what differs between the two is all that the function's body is about. `folder` is where
a run saves, and where the patients find what an earlier run has saved.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from pathlib import Path
from typing import Any

from helpers.data import DEVICES, IGNORE_INDEX, ROOMS, encode, load_commands
from helpers.models import enable_checkpointing, load_base, load_tokenizer
from helpers.training import training_arguments

import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

load_tiny = functools.partial(load_base, "tiny", dtype=torch.float32)
MLP = ["gate_proj", "up_proj", "down_proj"]


@functools.cache
def encoded(split: str = "train") -> Dataset:
    """Return a split of the sample task as rows for training, with the prompt masked."""
    return encode(load_commands(split), load_tokenizer("tiny"))


def new_adapter(base: PreTrainedModel | None = None, **settings: object) -> PeftModel:
    """Return `tiny`, or another base, with a fresh adapter on all linear layers; settings replace LoraConfig's."""
    base = load_tiny() if base is None else base
    set_seed(0)
    config = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return get_peft_model(base, LoraConfig(**(config | settings)))


def new_trainer(
    folder: str | Path,
    model: nn.Module | None = None,
    rows: Dataset | None = None,
    more: dict[str, Any] | None = None,
    **settings: object,
) -> Trainer:
    """Return the healthy run: 12 updates with batches of 4 at a learning rate of 5e-3, a log entry for each.

    Args:
        folder: for what the run saves.
        model: default: `new_adapter()`.
        rows: training rows; default: `encoded()`.
        more: further arguments of Trainer, which replace the defaults too.
        **settings: fields of TrainingArguments, which replace the defaults.
    """
    tokenizer = load_tokenizer("tiny")
    options = {"data_collator": DataCollatorForSeq2Seq(tokenizer), "eval_dataset": encoded("validation")} | (more or {})
    defaults = {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "logging_steps": 1}
    trainer = Trainer(
        model=new_adapter() if model is None else model,
        args=training_arguments(folder, **(defaults | settings)),
        train_dataset=encoded() if rows is None else rows,
        processing_class=options.pop("processing_class", tokenizer),
        **options,
    )
    trainer.remove_callback(PrinterCallback)  # it prints timings
    return trainer


def trained_adapter(folder: str | Path) -> Path:
    """Return the folder of an adapter that 40 updates of the healthy run have made; the first call trains it."""
    adapter = Path(folder) / "adapter"
    if not (adapter / "adapter_model.safetensors").exists():
        trainer = new_trainer(folder, max_steps=40)
        trainer.train()
        trainer.save_model(str(adapter))
    return adapter


def base_fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of the base's weights, the same with an adapter on it and without, in hexadecimal digits."""
    digest = hashlib.sha256()
    weights = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): p for name, p in model.named_parameters()
    }
    for name, parameter in sorted(weights.items()):
        if "lora_" not in name:
            digest.update(name.encode() + parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def missing_minus_sign(folder: Path, fixed: bool = False) -> Trainer:
    """The learning rate is meant to be 5e-3, and typed as 5e3."""
    return new_trainer(folder, learning_rate=5e-3 if fixed else 5e3, logging_steps=4)


def labels_all_masked(folder: Path, fixed: bool = False) -> Trainer:
    """The loss is to start after a marker, which is looked for among the token ids."""
    marker = load_tokenizer("tiny")("JSON:" if fixed else "\nJSON:").input_ids

    def masked(row: dict[str, list[int]]) -> dict[str, list[int]]:
        ids, n = row["input_ids"], len(marker)
        start = next((i + n for i in range(len(ids)) if ids[i : i + n] == marker), len(ids))
        return row | {"labels": [IGNORE_INDEX] * start + ids[start:]}

    return new_trainer(folder, rows=Dataset.from_list([masked(row) for row in encoded()]))


def loaded_for_inference(folder: Path, fixed: bool = False) -> Trainer:
    """An adapter from disk is to be trained on, with activation checkpointing."""
    adapter = trained_adapter(folder)
    model = PeftModel.from_pretrained(load_tiny(), adapter, is_trainable=fixed)  # the default is False
    return new_trainer(folder, model, gradient_checkpointing=True)


def optimizer_too_early(folder: Path, fixed: bool = False) -> Trainer:
    """An optimizer of one's own, built right after the model, and then the adapter."""
    base = load_tiny()
    optimizer = torch.optim.AdamW(base.parameters(), lr=5e-3)
    model = new_adapter(base)
    if fixed:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    return new_trainer(folder, model, more={"optimizers": (optimizer, None)})


def gradients_cut(folder: Path, fixed: bool = False) -> Trainer:
    """Reentrant checkpointing without the hook that makes the embedding's output need a gradient; the final norm
    trains too.
    """
    model = new_adapter(modules_to_save=["model.norm"])
    enable_checkpointing(model, use_reentrant=not fixed)
    model.get_base_model().disable_input_require_grads()
    return new_trainer(folder, model)


def rate_too_high(folder: Path, fixed: bool = False) -> Trainer:
    """A rate that would suit SGD, given to AdamW."""
    return new_trainer(folder, learning_rate=5e-3 if fixed else 0.2)


def rate_too_low(folder: Path, fixed: bool = False) -> Trainer:
    """A rate copied from a recipe for full fine-tuning."""
    return new_trainer(folder, learning_rate=5e-3 if fixed else 2e-5)


def half_of_the_targets(folder: Path, fixed: bool = False) -> Trainer:
    """Some of the target names come from another family of models."""
    model = new_adapter(target_modules=["q_proj", "v_proj", *(MLP if fixed else ["fc1", "fc2"])])
    return new_trainer(folder, model)


def adapter_in_bfloat16(folder: Path, fixed: bool = False) -> Trainer:
    """The base is in bfloat16, and the adapter is added by the model's own method."""
    model = load_base("tiny", dtype=torch.bfloat16)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    set_seed(0)
    if fixed:
        model = get_peft_model(model, config)
    else:
        model.add_adapter(config)
    return new_trainer(folder, model, learning_rate=1e-4, per_device_train_batch_size=2, bf16=False)


def ignored_on_resume(folder: Path, fixed: bool = False) -> Trainer:
    """After four updates the rate is found too low, raised, and the run resumed: train(resume_from_checkpoint=True)."""
    folder = Path(folder) / "resume"
    if not (folder / "checkpoint-4").exists():
        new_trainer(folder, learning_rate=1e-4, save_strategy="steps", save_steps=4, max_steps=4).train()
    if not fixed:
        return new_trainer(folder, learning_rate=5e-3)
    model = PeftModel.from_pretrained(load_tiny(), folder / "checkpoint-4", is_trainable=True)
    return new_trainer(folder, model, learning_rate=5e-3, max_steps=8)  # a new run, from the weights alone


def prompt_not_masked(folder: Path, fixed: bool = False) -> Trainer:
    """The labels are a copy of the input."""
    rows = encoded()
    if not fixed:
        rows = Dataset.from_list([row | {"labels": row["input_ids"]} for row in rows])
    return new_trainer(folder, rows=rows)


def which_device(split: str) -> Dataset:
    """Return rows whose completion is one word: the device of the request."""
    rows = [(row["prompt"].replace("JSON:", "Device:"), json.loads(row["completion"])) for row in load_commands(split)]
    return Dataset.from_list([{"prompt": prompt, "completion": " " + command["device"]} for prompt, command in rows])


def padded_with_eos(folder: Path, fixed: bool = False) -> Trainer:
    """The padding token is set to EOS, and transformers' own collator makes the labels."""
    tokenizer = load_tokenizer("tiny")
    rows = encode(which_device("train"), tokenizer).remove_columns("labels")
    if not fixed:
        tokenizer.pad_token = tokenizer.eos_token
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return new_trainer(folder, rows=rows, more={"data_collator": collator}, max_steps=24)


def eos_of_two_minds(folder: Path, fixed: bool = False) -> Trainer:
    """The base's config files name another EOS than the tokenizer's, with which the labels end.

    The Trainer gets the encoded rows and no tokenizer. With one as its `processing_class` it would give the model the
    tokenizer's EOS, in memory: the base that the adapter is loaded on later would still have its own.
    """
    model, tokenizer = new_adapter(), load_tokenizer("tiny")
    if not fixed:
        model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.pad_token_id
    rows = encode(which_device("train"), tokenizer)
    return new_trainer(folder, model, rows, more={"processing_class": None}, max_steps=24)


def labels_shifted_twice(folder: Path, fixed: bool = False) -> Trainer:
    """The label of each token is the next one, as in a loop of one's own that compares logits with labels directly."""
    rows = encoded()
    if not fixed:
        rows = Dataset.from_list([row | {"labels": [*row["labels"][1:], IGNORE_INDEX]} for row in rows])
    return new_trainer(folder, rows=rows, max_steps=40)


class OwnEvaluation(TrainerCallback):
    """Evaluate on 16 validation rows after each update; `switch_mode` says whether in eval mode, as it should be."""

    def __init__(self, switch_mode: bool) -> None:
        self.switch_mode = switch_mode
        self.batch = DataCollatorForSeq2Seq(load_tokenizer("tiny"))([encoded("validation")[i] for i in range(16)])

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        if self.switch_mode:
            model.eval()
        loss = model(**{key: value.to(model.device) for key, value in self.batch.items()}).loss.item()
        model.train()
        return loss

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.loss(kwargs["model"])


def evaluated_in_train_mode(folder: Path, fixed: bool = False) -> Trainer:
    """An evaluation of one's own, in a callback, which may leave the model in train mode."""
    evaluation = OwnEvaluation(switch_mode=fixed)
    return new_trainer(folder, new_adapter(lora_dropout=0.3), more={"callbacks": [evaluation]}, max_steps=6)


def codes(start: int, stop: int) -> Dataset:
    """Return rows to be learned by heart: the codes of some devices in some rooms, which are drawn at random."""
    numbers = random.Random(0)
    pairs = [(device, room, numbers.randrange(1000, 10_000)) for device in DEVICES for room in ROOMS]
    chosen = numbers.sample(pairs, len(pairs))[start:stop]
    return Dataset.from_list(
        [{"prompt": f"The code of the {r} {d}:", "completion": f" {code}"} for d, r, code in chosen]
    )


def duplicates_in_both_splits(folder: Path, fixed: bool = False) -> Trainer:
    """There are only eight rows, so each is taken twelve times, and a quarter of them is held out at random."""
    few = encode(codes(0, 8), load_tokenizer("tiny"))
    if fixed:
        split = few.train_test_split(0.25, seed=0)
        rows, held_out = concatenate_datasets([split["train"]] * 12), split["test"]
    else:
        split = concatenate_datasets([few] * 12).train_test_split(0.25, seed=0)
        rows, held_out = split["train"], split["test"]
    settings = {"learning_rate": 1e-2, "max_steps": 24, "eval_strategy": "steps", "eval_steps": 6}
    return new_trainer(folder, rows=rows, more={"eval_dataset": held_out}, **settings)


def cell_run_twice(folder: Path, fixed: bool = False) -> Trainer:
    """A notebook's cell `model = get_peft_model(model, config)` is run a second time."""
    model, targets = load_tiny(), ["q_proj", "k_proj", "v_proj", "o_proj", *MLP]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    for _ in range(1 if fixed else 2):
        set_seed(0)
        model = get_peft_model(model, config)
    return new_trainer(folder, model)


def wrong_base(folder: Path, fixed: bool = False) -> Trainer:
    """The adapter is loaded on a newer version of its base: same name, same shapes, trained further by its maker."""
    base = load_tiny()
    if not fixed:
        requests = [{"prompt": row["completion"], "completion": row["prompt"]} for row in load_commands("train")]
        new_trainer(
            folder, base, encode(Dataset.from_list(requests), load_tokenizer("tiny")), learning_rate=3e-3
        ).train()
    return new_trainer(folder, PeftModel.from_pretrained(base, trained_adapter(folder)))


def merged_twice(folder: Path, fixed: bool = False) -> Trainer:
    """One script merges the adapter into the model, and another, which does not know it, loads the adapter on that."""
    model = PeftModel.from_pretrained(load_tiny(), trained_adapter(folder))
    if not fixed:
        model = PeftModel.from_pretrained(model.merge_and_unload(), trained_adapter(folder))
    return new_trainer(folder, model)
