"""The Hugging Face Trainer, with settings for this machine."""

from __future__ import annotations

from pathlib import Path

from helpers.hardware import profile
from helpers.watch import LossLines

import torch
from datasets import Dataset
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)


def training_arguments(output_dir: str | Path, **overrides: object) -> TrainingArguments:
    """Return `transformers.TrainingArguments` for a LoRA run on this machine.

    The defaults are a LoRA learning rate of 1e-3 with a cosine schedule and a short warm-up, batches of 8 rows, mixed
    precision where the hardware profile's dtype asks for it, a log line every 5 steps, no checkpoints and no reports to
    other services. `overrides` are any fields of TrainingArguments.
    """
    sizes = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 64}
    return TrainingArguments(**({"output_dir": str(output_dir)} | sizes | default_settings() | overrides))


def default_settings() -> dict[str, object]:
    """Return the defaults of `training_arguments`, without folder and batch sizes, as fields of TrainingArguments.

    They are apart because constructing TrainingArguments does more: it initialises the process group.
    """
    machine = profile()
    return {
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,  # a number below 1 is a share of all steps
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": machine.device == "cpu",
        "fp16": machine.dtype == torch.float16,
        "bf16": machine.dtype == torch.bfloat16,
        # The Trainer looks for labels in forward's signature, where a PeftModel has **kwargs only.
        "label_names": ["labels"],
        "dataloader_pin_memory": machine.device == "cuda",
        "disable_tqdm": True,  # the loss is printed instead, see build_trainer
    }


def build_trainer(
    model: PreTrainedModel,
    arguments: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: Dataset,
    eval_dataset: Dataset | None = None,
    **options: object,
) -> Trainer:
    """Return a `transformers.Trainer` over encoded rows, which prints a line for each log entry.

    Args:
        model: usually from `peft.get_peft_model`.
        arguments: from `training_arguments`.
        tokenizer: saved beside the checkpoints; its padding token fills the batches.
        train_dataset, eval_dataset: rows from `helpers.data.encode`: the loss is taken where `labels` is not -100.
        **options: further arguments of Trainer, such as `callbacks` or `compute_metrics`.
    """
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        **options,
    )
    if arguments.disable_tqdm:
        # The Trainer's own printer shows raw dictionaries with timings.
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(LossLines())
    return trainer
