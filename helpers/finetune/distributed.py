"""What several processes need to be one run: checks that none of them is alone, and a stop that all agree on."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping

import torch
from accelerate.utils import DistributedType
from torch import distributed
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def check_world_size(world_size: int, environment: Mapping[str, str] = os.environ) -> None:
    """Raise if the launcher started several processes but this one sees world size 1.

    Such processes raise nothing by themselves: they do the same work, each for itself, and write one folder.

    Args:
        world_size: how many processes the training believes in, as TrainingArguments and Accelerator count them.
        environment: the process's own by default.

    Raises:
        ValueError: torchrun set WORLD_SIZE to more than one, or `accelerate launch` was asked for more than one
            process and started one (it then sets MASTER_ADDR, and neither WORLD_SIZE nor RANK).
    """
    meant = int(environment.get("WORLD_SIZE", "1"))
    if meant > 1 and world_size == 1:
        raise ValueError(
            f"the launcher started {meant} processes, and each would train alone, all of them writing one folder; "
            "on a machine without a GPU, set use_cpu=True (--use_cpu true)"
        )
    if {"MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"} <= environment.keys() and "RANK" not in environment:
        raise ValueError(
            "`accelerate launch` was asked for several processes and has started one; to have several on a CPU, start "
            "them with `torchrun --nproc_per_node=N` and set use_cpu=True (--use_cpu true)"
        )


def check_sharding(trainer: Trainer) -> None:
    """Raise where FSDP was asked for, by TrainingArguments or `accelerate launch`, and the Trainer does without.

    On CPUs, and with one process, it trains with DDP or alone, and each process holds the whole model.

    Raises:
        ValueError: the Trainer's accelerator does not shard.
    """
    asked = trainer.args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if asked and trainer.accelerator.distributed_type != DistributedType.FSDP:
        raise ValueError(
            f"FSDP was asked for, and the Trainer would use {trainer.accelerator.distributed_type.value}: each process "
            "would hold the whole model. FSDP in the Trainer needs more than one process, each with a GPU"
        )


class StopOnSigterm(TrainerCallback):
    """After a SIGTERM to any process, have all of them end the same update, save, and leave the training loop.

    The signal reaches the processes at different times, perhaps only one of them. So at the end of each update they
    take the maximum over all, which costs an all-reduce of four bytes. An evaluation that is due then is left out,
    since there may be only seconds left to save in. After the last update nothing is left to stop.

    Attributes:
        stopped: the training was ended by the signal.
    """

    received = stopped = False

    def __enter__(self) -> StopOnSigterm:
        """Take note of the signal instead of dying from it. Only the main thread of a process can do this."""

        def note(*_: object) -> None:
            self.received = True

        self._before = signal.signal(signal.SIGTERM, note)
        return self

    def __exit__(self, *_: object) -> None:
        """Handle the signal as before."""
        signal.signal(signal.SIGTERM, self._before)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        flag = torch.tensor(float(self.received), device=args.device)
        if distributed.is_initialized():
            distributed.all_reduce(flag, distributed.ReduceOp.MAX)
        if flag.item() and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.stopped:  # it has been saved
            control.should_save = control.should_evaluate = False
