"""Run by test_trainer.py: runs of the Trainer that are killed and started again. Argument: the folder for them.

Imports once, then forks a process for each run. Each process starts at the same state, untouched by any training.
Prints a line of JSON for each scenario.
"""

import gc
import hashlib
import json
import os
import shutil
import signal
import sys
import traceback
import warnings
from pathlib import Path

from helpers.finetune import checkpoints
from helpers.training import LossLines

import peft.peft_model
import shared
import torch
import transformers
from transformers import TrainerCallback

torch.set_num_threads(1)


def build(folder, callbacks=(), **overrides):
    """Dropout on; 3 updates an epoch of two micro-batches, the last a tail."""
    settings = {"max_steps": 6, "gradient_accumulation_steps": 2, "logging_steps": 1, "save_steps": 2} | overrides
    model = shared.adapter(lora_dropout=0.1, target_modules="all-linear")
    trainer = shared.trainer(folder, model, rows=5, callbacks=callbacks, **settings)
    trainer.remove_callback(LossLines)
    return trainer


def in_a_child(function, *arguments):
    """Run function in a forked process; return the signal that ended it, and the JSON that it returned."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.close(read)
        try:
            os.write(write, json.dumps(function(*arguments)).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    status = os.waitpid(child, 0)[1]
    return os.WTERMSIG(status), json.loads(answer or "null")


def run(folder, resume=None):
    trainer = build(folder)
    trainer.train(resume_from_checkpoint=resume)
    weights, losses = shared.result(trainer)
    digest = hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights)))
    return {"weights": digest.hexdigest(), "tensors": len(weights), "losses": losses}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class DieAt(TrainerCallback):
    def __init__(self, event, step):
        setattr(self, event, lambda args, state, control, **kwargs: die() if state.global_step == step else None)


def die_in_step(folder, event, step):
    build(folder, [DieAt(event, step)]).train()


def die_in_save(folder, name, share):
    """Die with only a share of one file of checkpoint-4 written."""

    def broken(write):
        def writer(first, path, *arguments, **kwargs):
            if not str(path).endswith(f"checkpoint-4/{name}"):
                return write(first, path, *arguments, **kwargs)
            if share:
                write(first, path, *arguments, **kwargs)
                os.truncate(path, int(share * Path(path).stat().st_size))
            return die()

        return writer

    torch.save = broken(torch.save)
    peft.peft_model.safe_save_file = broken(peft.peft_model.safe_save_file)
    transformers.TrainerState.save_to_json = broken(transformers.TrainerState.save_to_json)
    build(folder).train()


def die_in_rotation(folder, names):
    """Die while checkpoint-2 is deleted because checkpoint-4 was written."""

    def rmtree(path, **kwargs):
        for name in names:
            (Path(path) / name).unlink()
        die()

    shutil.rmtree = rmtree
    build(folder, save_total_limit=1).train()


def resume(folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = checkpoints.last_complete_checkpoint(folder)
    said = [str(warning.message) for warning in caught if "passed over" in str(warning.message)]
    return {"from": found and Path(found).name, "said": said, **run(folder, found)}


WEIGHTS, STATE = "adapter_model.safetensors", "trainer_state.json"
SCENARIOS = {
    "before the optimizer's step": (die_in_step, "on_pre_optimizer_step", 5),
    "between two micro-batches": (die_in_step, "on_substep_end", 3),
    "before the first checkpoint": (die_in_step, "on_substep_end", 1),
    **{
        f"half of {name}": (die_in_save, name, 0.5)
        for name in (WEIGHTS, "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", STATE)
    },
    "all but the last bytes of optimizer.pt": (die_in_save, "optimizer.pt", 0.99999),
    "nothing of trainer_state.json": (die_in_save, STATE, 0),
    "in the rotation": (die_in_rotation, ("optimizer.pt", "README.md")),
}


def main(folder):
    build(folder / "warm")  # nothing is trained here; what is compiled once need not be compiled in each process
    gc.freeze()  # a collection in a child would copy all of the parent's memory
    print(json.dumps({"name": "uninterrupted", **in_a_child(run, folder / "uninterrupted")[1]}), flush=True)
    for name, (kill, *arguments) in SCENARIOS.items():
        run_folder = folder / name.replace(" ", "-")
        number, _ = in_a_child(kill, run_folder, *arguments)
        left = sorted(path.name for path in run_folder.iterdir())
        result = in_a_child(resume, run_folder)[1]
        print(json.dumps({"name": name, "signal": number, "left": left, **result}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
