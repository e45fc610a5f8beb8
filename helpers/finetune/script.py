"""LoRA fine-tuning as a script, for one process or for many, under any launcher of PyTorch.

    python -m helpers.finetune --model smollm2-135m --train data.jsonl --output_dir run
    torchrun --nproc_per_node=8 -m helpers.finetune --model … --train … --output_dir …
    accelerate launch --config_file helpers/assets/accelerate/fsdp2.yaml -m helpers.finetune --model … --train …

It takes the flags below and all those of transformers' TrainingArguments. The result, adapter and metrics, is the
folder OUTPUT_DIR/final; it appears in one step when the run has ended, and not before.

A run that was interrupted goes on from its last complete checkpoint when the same command is given again. (Under FSDP
and DeepSpeed: from the last one. If that is incomplete, delete it.) With other settings or another engine it is
refused: the Trainer would ignore some of them without a word. On SIGTERM, which SLURM and Kubernetes
send before they take a machine away, all processes finish the same update, save a checkpoint and exit. Under torchrun
they have 30 seconds for it (--shutdown_timeout). `accelerate launch` with one process keeps the signal to itself: start
one process with `python -m`.

The run is watched by DiagnosticsCallback (not under FSDP and DeepSpeed): what it finds is a warning, and a loss,
gradient or weight that is not finite ends the run without a result.

Exit codes: 0 the run has ended, now or earlier; 2 something is wrong with what was given; 3 the run has diverged; 143
stopped by SIGTERM, a checkpoint is saved. torchrun itself exits with 1 where a process does not exit with 0.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import warnings
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

from helpers import training
from helpers.data import IGNORE_INDEX, encode
from helpers.diagnose import diagnose, diagnose_batch
from helpers.finetune.distributed import StopOnSigterm, check_sharding, check_world_size
from helpers.finetune.folders import atomic_folder, atomic_write_text
from helpers.finetune.own_data import load_examples, shared_prompts
from helpers.finetune.runs import FINAL, SETTINGS, UNSHARDED, lock_and_find_checkpoint, record
from helpers.models import load_base, load_tokenizer, public_name
from helpers.watch import DiagnosticsCallback

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from torch import distributed
from transformers import (
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging as transformers_logging

ENDED, WRONG, DIVERGED, STOPPED = 0, 2, 3, 128 + signal.SIGTERM


@dataclass
class FinetuneArguments:
    """What is trained, and on what. How is said by TrainingArguments."""

    train: str = field(metadata={"help": "JSON Lines or CSV with prompt and completion, or chat messages"})
    model: str = field(default="smollm2-135m", metadata={"help": "tiny, smollm2-135m, a folder, or the id of a hub"})
    validation: str | None = field(default=None, metadata={"help": "rows for the evaluation at the end, if any"})
    max_length: int = field(default=512, metadata={"help": "tokens kept of each row"})
    lora_r: int = field(default=16, metadata={"help": "rank of the adapter"})
    lora_alpha: int = field(default=32, metadata={"help": "the adapter is scaled by lora_alpha / lora_r"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout on the adapter's input"})
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "names of the layers to adapt, or all-linear"}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "keep the base model in NF4 (QLoRA)"})


def main(command_line: list[str] | None = None) -> int:
    """Run the script, with the process's own command line by default, and return its exit code."""
    with StopOnSigterm() as stop, ExitStack() as held:  # held: the lock of the folder
        try:
            settings, arguments = _parse(command_line)
            trainer, checkpoint = _prepare(settings, arguments, stop, held)
        except (ValueError, OSError) as error:
            if os.environ.get("LOCAL_RANK", "0") == "0":  # once on each machine, since each reads its own files
                print(f"error: {error}", file=sys.stderr)
            return WRONG
        if trainer is None:
            message = f"this run has ended already; its result is in {Path(arguments.output_dir) / FINAL}"
        else:
            try:
                trainer.train(resume_from_checkpoint=checkpoint)
                if not stop.stopped:
                    _write_final(trainer, settings)
            except FloatingPointError as error:  # the other processes, if any, are ended by torchrun
                print(f"error: {error} There is no result.", file=sys.stderr)
                return DIVERGED
            step = trainer.state.global_step
            message = f"SIGTERM: checkpoint-{step} is saved. The same command goes on from there"
            if not stop.stopped:
                message = f"ended after {step} updates; the result is in {Path(arguments.output_dir) / FINAL}"
        if distributed.is_initialized():
            distributed.barrier()  # until all have written their files
            # The model in DDP must let go of the group first. Otherwise it ends the group (torch 2.13): holding the
            # GIL, it waits for gloo's thread, which may be waiting for the GIL to free the barrier's tensor.
            del trainer
            gc.collect()
            distributed.destroy_process_group()
        if arguments.process_index == 0:
            print(message)
        return STOPPED if stop.stopped else ENDED


def _parse(command_line: list[str] | None) -> tuple[FinetuneArguments, TrainingArguments]:
    parser = HfArgumentParser((FinetuneArguments, TrainingArguments), prog="helpers.finetune", description=__doc__)
    parser.set_defaults(**defaults())
    return parser.parse_args_into_dataclasses(command_line)


def defaults() -> dict[str, object]:
    """Return what replaces defaults of TrainingArguments: those of the notebooks, with checkpoints."""
    saving = {"save_strategy": "steps", "save_steps": 100, "ddp_find_unused_parameters": False}
    return training.default_settings() | saving


def _prepare(
    settings: FinetuneArguments, arguments: TrainingArguments, stop: StopOnSigterm, held: ExitStack
) -> tuple[Trainer | None, str | None]:
    """Return a Trainer and the checkpoint that it should go on from; no Trainer if the run has ended."""
    check_world_size(arguments.world_size)
    for flag in ("save_only_model", "enable_jit_checkpoint"):
        if getattr(arguments, flag):
            raise ValueError(f"--{flag}: leave it out; this script saves checkpoints that a run can be resumed from")
    if arguments.process_index > 0:
        warnings.simplefilter("ignore")
        transformers_logging.set_verbosity_error()
    if settings.load_in_4bit and is_deepspeed_zero3_enabled():
        raise ValueError("--load_in_4bit does not go with DeepSpeed ZeRO-3; take FSDP (assets/accelerate/fsdp2.yaml)")
    engine = _engine(arguments)
    # The first process looks at the folder, and all hear the same from it.
    answer: list[object] = [None, False, None]
    if arguments.process_index == 0:
        try:
            given = {**asdict(settings), "target_modules": sorted(settings.target_modules)}
            del given["validation"]
            answer[:2] = lock_and_find_checkpoint(record(given, arguments, engine), arguments, held)
        except (ValueError, OSError) as error:
            answer[2] = str(error)
    checkpoint, ended, fault = broadcast_object_list(answer)
    if fault:
        raise ValueError(fault)
    if ended:
        return None, None

    tokenizer = load_tokenizer(settings.model)
    rows, validation = _rows(settings, tokenizer)
    model = build_model(settings, arguments, sharded=engine != UNSHARDED).train()
    if findings := diagnose(model):
        raise ValueError("; ".join(f"{finding.message}: {finding.remedy}" for finding in findings))
    first = DataCollatorForSeq2Seq(tokenizer)([rows[i] for i in range(min(8, len(rows)))])
    for finding in diagnose_batch(model, first):  # here, since the Trainer will set the model's EOS to the tokenizer's
        warnings.warn(f"{finding.code}: {finding.message}. {finding.remedy}", stacklevel=2)
    watch = [DiagnosticsCallback()] if engine == UNSHARDED else []  # it would look at parts of sharded weights
    trainer = training.build_trainer(
        model,
        arguments,
        tokenizer,
        rows,
        validation,
        callbacks=[stop, *watch],
        compute_metrics=loss_per_label_token,
        preprocess_logits_for_metrics=loss_and_label_tokens,
    )
    check_sharding(trainer)
    return trainer, checkpoint


def _engine(arguments: TrainingArguments) -> str:
    for name, asked in (("FSDP", arguments.fsdp), ("DeepSpeed", arguments.deepspeed)):
        if asked or os.environ.get(f"ACCELERATE_USE_{name.upper()}") == "true":  # `accelerate launch` sets it
            return name
    return UNSHARDED


def _rows(settings: FinetuneArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, Dataset | None]:
    """Return the training and the validation rows, encoded; what they share is named in a warning."""
    texts, rows = [], []
    for path in filter(None, (settings.train, settings.validation)):
        try:
            texts.append(load_examples(path, tokenizer))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                rows.append(encode(texts[-1], tokenizer, settings.max_length))
        except ValueError as error:
            raise ValueError(str(error) if path in str(error) else f"{path}, {error}") from None
        for warning in caught:
            warnings.warn(f"{path}: {warning.message}", stacklevel=2)
    if shared := shared_prompts(texts[1], texts[0]) if settings.validation else []:
        which = ", ".join(map(str, shared[:5])) + ("…" if len(shared) > 5 else "")
        warnings.warn(
            f"{settings.validation}: the prompts of {len(shared)} of {len(texts[1])} rows ({which}) are in "
            f"{settings.train} too, but for case and punctuation: a leak, which makes the validation loss too good",
            stacklevel=2,
        )
    return rows[0], rows[1] if settings.validation else None


def loss_and_label_tokens(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the summed loss of each row and its number of label tokens, (batch, 2), to be kept for the metrics."""
    targets = labels[:, 1:]  # (batch, T - 1)
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none"
    )
    return torch.stack([losses.sum(dim=1), (targets != IGNORE_INDEX).sum(dim=1)], dim=1)


def loss_per_label_token(evaluation: EvalPrediction) -> dict[str, float]:
    """Return the loss in nats, where each token counts the same; the Trainer's own is a mean over batches."""
    total, tokens = evaluation.predictions.astype(float).sum(axis=0)
    return {"loss_per_label_token": total / tokens}


def build_model(settings: FinetuneArguments, arguments: TrainingArguments, sharded: bool = False) -> PeftModel:
    """Return the base model with a fresh adapter.

    If it will be sharded, by FSDP or DeepSpeed, it stays on the CPU, and 4-bit weights are stored in the dtype that
    FSDP computes in: Accelerate leaves bytes whole, and FSDP2 would cast another. `prepare_model_for_kbit_training`
    would turn the other weights to fp32, so then it is left out.
    """
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    nf4 |= {"bnb_4bit_compute_dtype": dtype, "bnb_4bit_quant_storage": dtype if sharded else torch.uint8}
    quantization = BitsAndBytesConfig(**nf4) if settings.load_in_4bit else None
    device = "cpu" if sharded else arguments.device
    model = load_base(settings.model, quantization=quantization, dtype=dtype, device=device)
    if quantization and not sharded:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=arguments.gradient_checkpointing)
    adapter = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear" if settings.target_modules == ["all-linear"] else settings.target_modules,
        task_type="CAUSAL_LM",
    )
    set_seed(arguments.seed)  # the Trainer's own seed comes too late for the adapter's start
    return get_peft_model(model, adapter)


def _write_final(trainer: Trainer, settings: FinetuneArguments) -> None:
    """Write adapter, tokenizer, metrics and card into a folder beside the final one; rename it when all is there."""
    arguments, log = trainer.args, trainer.state.log_history
    evaluation = trainer.evaluate() if trainer.eval_dataset is not None else {}
    evaluation.pop("eval_loss", None)  # a mean over batches, which depends on their size
    final = Path(arguments.output_dir) / FINAL
    first = arguments.process_index == 0  # it makes the folder and renames it; the others know its name only
    with atomic_folder(final) if first else nullcontext(Path(f"{final}.unfinished")) as folder:
        trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(folder))  # all take part: a sharded model is gathered
        trainer.accelerator.wait_for_everyone()
        if first:
            if not (folder / "adapter_model.safetensors").exists():  # so does FSDP with SHARDED_STATE_DICT
                raise OSError(
                    f"{folder}: the Trainer saved no adapter; with FSDP, set fsdp_state_dict_type FULL_STATE_DICT"
                )
            tensors = load_file(folder / "adapter_model.safetensors")
            if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
                raise FloatingPointError(f"{len(broken)} of {len(tensors)} tensors of the result are not finite.")
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody needs
            config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            config["base_model_name_or_path"] = public_name(settings.model)  # and not a folder of this machine
            atomic_write_text(folder / "adapter_config.json", json.dumps(config, indent=1) + "\n")
            atomic_write_text(folder / "README.md", card(trainer, settings, evaluation))
            metrics = {"updates": trainer.state.global_step, "processes": arguments.world_size, "log": log}
            atomic_write_text(folder / "metrics.json", json.dumps(metrics | evaluation, indent=1) + "\n")


def card(trainer: Trainer, settings: FinetuneArguments, evaluation: Mapping[str, float]) -> str:
    """Return a model card that says what was trained, and what was measured."""
    arguments, base = trainer.args, public_name(settings.model)
    on_the_hub = f"base_model: {base}\n" if "/" in base else ""
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    trained_on = json.loads((Path(arguments.output_dir) / SETTINGS).read_text(encoding="utf-8"))["train"]
    measured = "Nothing: no validation file was given."
    if evaluation:
        loss = evaluation["eval_loss_per_label_token"]
        measured = f"A loss of {loss:.4f} nats per label token on {len(trainer.eval_dataset)} validation rows."
    return f"""---
{on_the_hub}library_name: peft
pipeline_tag: text-generation
tags:
- lora
---
# A LoRA adapter for {base}

**Base:** {base}{", in 4 bits (NF4)" if settings.load_in_4bit else ""}.
**Adapter:** LoRA with r={settings.lora_r}, lora_alpha={settings.lora_alpha}, lora_dropout={settings.lora_dropout} on
{", ".join(settings.target_modules)}.

**Data:** {len(trainer.train_dataset)} rows, of a file with the SHA-256 `{trained_on}…`, cut at {settings.max_length}
tokens. The loss was taken on completions and answers, EOS included.

**Training:** {trainer.state.global_step} updates of {batch} rows, learning rate {arguments.learning_rate:g}
({arguments.lr_scheduler_type.value}), seed {arguments.seed}.

**Measured:** {measured} No answer has been generated or compared: do that before you use it.
"""
