"""The folder of a run of `helpers.finetune`: whose it is, what must stay when the run goes on, and where it stands."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from helpers.finetune.checkpoints import last_complete_checkpoint
from helpers.finetune.folders import atomic_write_text

from filelock import FileLock, Timeout
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

FINAL, SETTINGS, LOCK = "final", "finetune.json", "finetune.lock"
UNSHARDED = "DDP or one process"
# The fields of TrainingArguments that decide what is learned, besides the effective batch.
DECISIVE = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "num_train_epochs", "max_steps",
    "weight_decay", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed",
    "data_seed", "bf16", "fp16", "label_smoothing_factor", "neftune_noise_alpha", "average_tokens_across_devices",
    "train_sampling_strategy", "dataloader_drop_last", "accelerator_config", "ignore_data_skip",
)  # fmt: skip


def record(given: Mapping[str, object], arguments: TrainingArguments, engine: str) -> dict[str, object]:
    """Return what must stay when a run goes on. How the effective batch is made up may change.

    Args:
        given: the script's own settings. `train` is a file, of which the content is taken and not the name.
        arguments: of the Trainer; its DECISIVE fields are taken.
        engine: the checkpoints of one are none for another.
    """
    kept, values, train = dict(given), arguments.to_dict(), Path(str(given["train"]))
    if train.is_file():
        kept["train"] = hashlib.sha256(train.read_bytes()).hexdigest()[:16]
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    kept |= {"engine": engine, "effective batch": batch} | {name: values[name] for name in DECISIVE if name in values}
    return json.loads(json.dumps(kept, default=str))


def lock_and_find_checkpoint(
    now: Mapping[str, object], arguments: TrainingArguments, held: ExitStack
) -> tuple[str | None, bool]:
    """Lock the output folder, check that its settings match, and return (checkpoint, finished).

    Args:
        now: the `record` of this run. It is written into the folder at the first start, and compared after that.
        arguments: `output_dir` is the folder; it is made if need be.
        held: keeps the lock until it is closed.

    Raises:
        ValueError: another process writes there, or the folder holds a run with another record or with none.
    """
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held.enter_context(FileLock(folder / LOCK, timeout=0))  # if the process dies, the system lets go of it
    except Timeout:
        raise ValueError(f"{folder}: another run is writing there; wait for it, or give another --output_dir") from None
    ended, found = (folder / FINAL).exists(), get_last_checkpoint(str(folder))
    if (folder / SETTINGS).exists():
        before = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        changes = [f"{key} was {before.get(key)} and is {new}" for key, new in now.items() if before.get(key) != new]
        if changes:
            state = "holds the result of a run" if ended else "holds a run that began"
            raise ValueError(f"{folder} {state} with other settings: {'; '.join(changes)}. Give another --output_dir")
    elif ended or found:
        raise ValueError(f"{folder} holds a run that this script did not start; give another --output_dir")
    else:
        atomic_write_text(folder / SETTINGS, json.dumps(now, indent=1) + "\n")
    if ended:
        return None, True
    if now["engine"] == UNSHARDED:  # nothing here knows when a checkpoint of the other engines is complete
        found = last_complete_checkpoint(folder)
    checkpoint = arguments.resume_from_checkpoint or found
    states = len(list(Path(checkpoint).glob("rng_state*.pth"))) if checkpoint else arguments.world_size
    if states != arguments.world_size:
        warnings.warn(
            f"{checkpoint} has the random state of {states} processes and this run has {arguments.world_size}: its "
            "dropout is not that of a run without a break",
            stacklevel=2,
        )
    return checkpoint, False
