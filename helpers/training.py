"""One training run three ways, from the same settings: the Hugging Face Trainer, Accelerate, and plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

from helpers.accumulation import windows
from helpers.callbacks import DiagnosticsCallback as DiagnosticsCallback
from helpers.callbacks import LossLines
from helpers.data import IGNORE_INDEX, Collator
from helpers.hardware import Profile

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from datasets import Dataset
from torch.utils.data import DataLoader, RandomSampler
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    get_scheduler,
    set_seed,
)

# What only the Trainer does: fields that must be unset for the two loops, and the values that they take of others.
UNSET = (
    "activation_checkpointing", "auto_find_batch_size", "dataloader_drop_last", "deepspeed", "fsdp", "full_determinism",
    "gradient_checkpointing", "label_smoothing_factor", "neftune_noise_alpha", "report_to", "resume_from_checkpoint",
    "torch_compile", "use_liger_kernel",
)  # fmt: skip
TAKEN = {
    "optim": ("adamw_torch", "adamw_torch_fused"), "eval_strategy": ("no",), "save_strategy": ("no",),
    "train_sampling_strategy": ("random",), "world_size": (1,), "n_gpu": (0, 1),
}  # fmt: skip


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
    sizes = {
        "per_device_train_batch_size": profile.train_batch_size,
        "per_device_eval_batch_size": profile.eval_batch_size,
    }
    return TrainingArguments(**({"output_dir": str(output_dir)} | sizes | default_settings(profile) | overrides))


def default_settings(profile: Profile) -> dict[str, object]:
    """Return the defaults of `training_arguments`, without folder and batch sizes, as fields of TrainingArguments.

    They are apart because making TrainingArguments does more: under a launcher it makes the processes meet.
    """
    return {
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


def train_pytorch(
    model: PreTrainedModel, arguments: TrainingArguments, tokenizer: PreTrainedTokenizerBase, train_dataset: Dataset
) -> list[dict[str, float]]:
    """Train in plain PyTorch, as `build_trainer(…).train()` does with the same arguments.

    Order of the data, decayed parameters, schedule, clipping, token-weighted accumulation, autocast and gradient
    scaling are the Trainer's; in fp32 the weights agree to rounding. Two things differ: a loss that is NaN is returned
    as NaN, where the Trainer logs 0; and a step that GradScaler skips never moves the schedule, while it does in the
    Trainer with the fused optimizer.

    Args:
        model: usually from `peft.get_peft_model`; its loss must take `num_items_in_batch`, as Transformers' causal
            models do. It is moved to `arguments.device` and left in train mode.
        arguments: from `training_arguments`. There is a progress bar unless `disable_tqdm`, and no log lines.
        tokenizer: its padding token fills the batches.
        train_dataset: rows from `helpers.data.encode`.

    Returns:
        A dict for each update, like those of `trainer.state.log_history` with `logging_steps=1`: `step` (from 1),
        `loss` (nats per label token of the window), `grad_norm` (before clipping), `learning_rate` (of this update).

    Raises:
        ValueError: `arguments` asks for what only the Trainer does, or fp16 without CUDA; a window has no label token.
    """
    _refuse_what_only_the_trainer_does(arguments)
    set_seed(arguments.seed)
    device = arguments.device
    if next(model.parameters()).device != device:  # a quantized model is there already, and must not be moved
        model.to(device)
    generator = torch.Generator()  # of its own, so that dropout does not change the order of the data
    sampler = RandomSampler(train_dataset, generator=generator)
    batch_size, collate = arguments.per_device_train_batch_size, Collator(tokenizer)
    loader = DataLoader(train_dataset, batch_size, sampler=sampler, collate_fn=collate)
    optimizer, scheduler = _optimizer_and_scheduler(model, arguments, len(loader))
    half = torch.float16 if arguments.fp16 else torch.bfloat16
    autocast = torch.autocast(device.type, dtype=half, enabled=arguments.fp16 or arguments.bf16)
    scaler = torch.amp.GradScaler(device.type, enabled=arguments.fp16)  # when it is off, its methods pass through
    history: list[dict[str, float]] = []
    model.train()
    model.zero_grad()
    data_seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    for window, label_tokens in _updates(arguments, loader, lambda epoch: generator.manual_seed(data_seed + epoch)):
        loss = torch.zeros((), device=device)
        for batch in window:
            inputs = {key: value.to(device) for key, value in batch.items()}
            with autocast:
                share = model(**inputs, num_items_in_batch=label_tokens).loss  # sum of token losses / label_tokens
            scaler.scale(share).backward()
            loss += share.detach()
        scaler.unscale_(optimizer)  # clipping needs the true gradients
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), arguments.max_grad_norm or math.inf)
        rate = scheduler.get_last_lr()[0]
        history.append({"step": len(history) + 1, "loss": loss.item(), "grad_norm": norm.item(), "learning_rate": rate})
        scale = scaler.get_scale()
        scaler.step(optimizer)  # skips the step if a gradient is inf or NaN
        scaler.update()  # lowers the scale after such a step
        if scaler.get_scale() >= scale:
            scheduler.step()
        model.zero_grad()
    return history


def train_accelerate(
    model: PreTrainedModel, arguments: TrainingArguments, tokenizer: PreTrainedTokenizerBase, train_dataset: Dataset
) -> list[dict[str, float]]:
    """Train with Accelerate, as `build_trainer(…).train()` does with the same arguments.

    Arguments, result and errors are those of `train_pytorch`, except that a skipped step moves the schedule when it
    does so in the Trainer. Accelerate's own accumulation is left off: it weights micro-batches, and not tokens.
    """
    _refuse_what_only_the_trainer_does(arguments)
    set_seed(arguments.seed)
    data_seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    order = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=data_seed)
    precision = "fp16" if arguments.fp16 else "bf16" if arguments.bf16 else "no"
    accelerator = Accelerator(cpu=arguments.use_cpu, mixed_precision=precision, dataloader_config=order)
    accelerator.sync_gradients = True  # all Accelerators share it, and an interrupted accumulate() leaves it False
    batch_size, collate = arguments.per_device_train_batch_size, Collator(tokenizer)
    loader = DataLoader(train_dataset, batch_size, shuffle=True, collate_fn=collate)
    optimizer, scheduler = _optimizer_and_scheduler(model, arguments, len(loader))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    history: list[dict[str, float]] = []
    model.train()
    model.zero_grad()
    for window, label_tokens in _updates(arguments, loader, loader.set_epoch):
        loss = torch.zeros((), device=accelerator.device)
        for batch in window:
            with accelerator.autocast():
                share = model(**batch, num_items_in_batch=label_tokens).loss
            accelerator.backward(share)  # scales it for fp16
            loss += share.detach()
        norm = accelerator.clip_grad_norm_(model.parameters(), arguments.max_grad_norm or math.inf)  # unscales
        rate = scheduler.get_last_lr()[0]
        history.append({"step": len(history) + 1, "loss": loss.item(), "grad_norm": norm.item(), "learning_rate": rate})
        optimizer.step()
        if not accelerator.optimizer_step_was_skipped:
            scheduler.step()
        model.zero_grad()
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # or its forward would stay under autocast
    return history


def _refuse_what_only_the_trainer_does(arguments: TrainingArguments) -> None:
    wrong = [field for field in UNSET if getattr(arguments, field, None)]
    wrong += [field for field, values in TAKEN.items() if getattr(arguments, field, values[0]) not in values]
    wrong += ["lr_scheduler_type"] * (arguments.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"))
    wrong += ["accelerator_config"] * (not arguments.accelerator_config.use_seedable_sampler)  # another order
    if wrong:
        values = arguments.to_dict()
        settings = ", ".join(f"{field}={values.get(field, getattr(arguments, field))}" for field in wrong)
        raise ValueError(f"{settings}: this loop does not do that; change it, or use helpers.training.build_trainer")
    if arguments.fp16 and arguments.device.type != "cuda":
        raise ValueError("fp16=True needs CUDA; elsewhere the Trainer may train in fp32 without a word: set fp16=False")


def _number_of_updates(arguments: TrainingArguments, batches: int) -> int:
    per_epoch = math.ceil(batches / arguments.gradient_accumulation_steps)
    return arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * per_epoch)


def _optimizer_and_scheduler(
    model: PreTrainedModel, arguments: TrainingArguments, batches: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    adamw, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)  # torch.optim.AdamW; lr, betas, eps, fused
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # no biases and norms; all of LoRA's A and B
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    with_decay = {"params": [p for name, p in trained if name in decayed], "weight_decay": arguments.weight_decay}
    without = {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0}
    optimizer = adamw([with_decay, without], **settings)
    updates, options = _number_of_updates(arguments, batches), arguments.lr_scheduler_kwargs
    schedule = (optimizer, arguments.get_warmup_steps(updates), updates)
    return optimizer, get_scheduler(arguments.lr_scheduler_type, *schedule, scheduler_specific_kwargs=options)


def _updates(
    arguments: TrainingArguments, loader: DataLoader, start_epoch: Callable[[int], object]
) -> Iterator[tuple[list[dict[str, torch.Tensor]], int]]:
    """Yield each update's micro-batches and label tokens (nothing predicts a row's first token), under a bar."""
    per_epoch = math.ceil(len(loader) / arguments.gradient_accumulation_steps)
    for step in tqdm(range(_number_of_updates(arguments, len(loader))), disable=arguments.disable_tqdm):
        if step % per_epoch == 0:
            start_epoch(step // per_epoch)
            epoch = windows(loader, arguments.gradient_accumulation_steps)
        window = next(epoch)
        label_tokens = sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in window)
        if label_tokens == 0:
            raise ValueError("a window has no label token; check that truncation leaves part of each completion")
        yield window, label_tokens
