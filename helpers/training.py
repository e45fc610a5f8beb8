"""The Hugging Face Trainer, with the settings that the hardware asks for."""

from __future__ import annotations

from pathlib import Path

from helpers.data import Collator
from helpers.hardware import Profile

import torch
from datasets import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)


def training_arguments(profile: Profile, output_dir: str | Path, **overrides: object) -> TrainingArguments:
    """Return `transformers.TrainingArguments` for a LoRA run on this machine.

    The defaults are a LoRA learning rate of 1e-3 with a cosine schedule and a short warm-up, mixed precision where the
    profile's dtype asks for it, a log line every 5 steps, no checkpoints and no reports to other services.

    Args:
        profile: from `helpers.hardware.profile`.
        output_dir: where checkpoints and logs go.
        **overrides: any field of TrainingArguments; it replaces the default. `report_to="tensorboard"` logs to
            TensorBoard.

    Raises:
        TypeError: an override is no field of TrainingArguments.
    """
    settings: dict[str, object] = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": profile.train_batch_size,
        "per_device_eval_batch_size": profile.eval_batch_size,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,  # a number below 1 is a share of all steps
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": profile.device == "cpu",
        "fp16": profile.dtype == torch.float16,
        "bf16": profile.dtype == torch.bfloat16,
        "label_names": ["labels"],  # a PeftModel's signature hides it from the Trainer
        "dataloader_pin_memory": profile.device == "cuda",
        "disable_tqdm": True,  # the loss is printed instead, see build_trainer
    }
    return TrainingArguments(**(settings | overrides))


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
        model: the model to train, usually from `peft.get_peft_model`.
        arguments: from `training_arguments`.
        tokenizer: saved beside the checkpoints; its padding token fills the batches.
        train_dataset: rows from `helpers.data.encode`: the loss is taken where `labels` is not -100.
        eval_dataset: the same for evaluation; it is used when `eval_strategy` is set.
        **options: further arguments of Trainer, such as `callbacks` or `compute_metrics`.
    """
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=Collator(tokenizer),
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


class LossLines(TrainerCallback):
    """Print "step 10 of 40: loss 0.52" at every log entry of the Trainer, and the loss of each evaluation."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        for key, words in (("loss", "loss"), ("eval_loss", "validation loss")):
            if key in logs:
                width = len(str(state.max_steps))
                print(f"step {state.global_step:{width}d} of {state.max_steps}: {words} {logs[key]:.2f}", flush=True)
