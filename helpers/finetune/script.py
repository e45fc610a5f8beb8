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

Exit codes: 0 the run has ended, now or earlier; 2 something is wrong with what was given; 143 stopped by SIGTERM, a
checkpoint is saved. torchrun itself exits with 1 where a process does not exit with 0.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import warnings
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

from helpers import training
from helpers.data import encode
from helpers.diagnose import diagnose
from helpers.finetune.distributed import StopOnSigterm, check_sharding, check_world_size
from helpers.finetune.folders import atomic_folder, atomic_write_text
from helpers.finetune.own_data import load_examples
from helpers.finetune.runs import FINAL, UNSHARDED, lock_and_find_checkpoint, record
from helpers.models import load_base, load_tokenizer

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import distributed
from transformers import (
    BitsAndBytesConfig,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging as transformers_logging

ENDED, WRONG, STOPPED = 0, 2, 128 + signal.SIGTERM


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
            trainer.train(resume_from_checkpoint=checkpoint)
            step = trainer.state.global_step
            message = f"SIGTERM: checkpoint-{step} is saved. The same command goes on from there"
            if not stop.stopped:
                _write_final(trainer)
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
    rows = _rows(settings.train, tokenizer, settings.max_length)
    validation = _rows(settings.validation, tokenizer, settings.max_length) if settings.validation else None
    model = build_model(settings, arguments, sharded=engine != UNSHARDED)
    if findings := diagnose(model):
        raise ValueError("; ".join(f"{finding.message}: {finding.remedy}" for finding in findings))
    trainer = training.build_trainer(model, arguments, tokenizer, rows, validation, callbacks=[stop])
    check_sharding(trainer)
    return trainer, checkpoint


def _engine(arguments: TrainingArguments) -> str:
    for name, asked in (("FSDP", arguments.fsdp), ("DeepSpeed", arguments.deepspeed)):
        if asked or os.environ.get(f"ACCELERATE_USE_{name.upper()}") == "true":  # `accelerate launch` sets it
            return name
    return UNSHARDED


def _rows(path: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    try:
        return encode(load_examples(path, tokenizer), tokenizer, max_length)
    except ValueError as error:
        raise ValueError(str(error) if path in str(error) else f"{path}, {error}") from None


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


def _write_final(trainer: Trainer) -> None:
    """Write adapter, tokenizer and metrics into a folder beside the final one; rename it when all of it is there."""
    arguments, log = trainer.args, trainer.state.log_history
    evaluation = trainer.evaluate() if trainer.eval_dataset is not None else {}
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
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody needs
            metrics = {"updates": trainer.state.global_step, "processes": arguments.world_size, "log": log}
            atomic_write_text(folder / "metrics.json", json.dumps(metrics | evaluation, indent=1) + "\n")
