"""Run by test_finetune.py: runs of helpers.finetune that are stopped and killed. Argument: a folder with data.jsonl.

Imports once, then forks the processes of each run, so that none of them pays for the imports and each starts untouched
by any training. Prints a line of JSON for each run.
"""

import contextlib
import gc
import io
import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from functools import partial
from pathlib import Path

from helpers import models
from helpers.finetune import script as finetune

import torch
from transformers import TrainerCallback

torch.set_num_threads(1)
TERM, KILL = signal.SIGTERM, signal.SIGKILL
build_trainer = finetune.training.build_trainer
write_whole = finetune.atomic_write_text


class At(TrainerCallback):
    """Do something at an event of the Trainer, in one of its updates."""

    def __init__(self, event, step, action):
        setattr(self, event, lambda args, state, control, **kwargs: action() if state.global_step == step else None)


def signalled(signals):
    """Send this process a signal of its own: {rank: (event, step, signal)}."""
    if (rank := int(os.environ.get("RANK", 0))) in signals:
        event, step, number = signals[rank]
        at = At(event, step, lambda: os.kill(os.getpid(), number))
        finetune.training.build_trainer = lambda *a, callbacks, **k: build_trainer(*a, callbacks=[*callbacks, at], **k)


def die_in_the_end(where):
    """Die while the result is written."""

    def write(path, text):
        if path.name == "metrics.json":
            if where == "after-the-metrics":
                write_whole(path, text)
            os.kill(os.getpid(), KILL)
        write_whole(path, text)

    finetune.atomic_write_text = write


def command(folder, name, processes, dropout):
    return [
        "--train", str(folder / "data.jsonl"), "--model", "tiny", "--output_dir", str(folder / name),
        "--use_cpu", "true", "--max_steps", "6", "--per_device_train_batch_size", str(2 // processes),
        "--gradient_accumulation_steps", "2", "--logging_steps", "1", "--save_steps", "2", "--lora_r", "4",
        "--lora_dropout", str(dropout),
    ]  # fmt: skip


def child(rank, processes, port, patch, arguments, log):
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = 99
    try:
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        if patch:
            patch()
        code = finetune.main(arguments)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def start(folder, name, processes=1, patch=None, dropout=0.1):
    """Print what became of each process: its exit code, or minus the signal. A process that hangs is killed: -9."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / f"{name}-{time.monotonic_ns()}.log"
    children = []
    for rank in range(processes):
        if (pid := os.fork()) == 0:
            child(rank, processes, port, patch, command(folder, name, processes, dropout), log)
        children.append(pid)
    codes, until = {}, time.monotonic() + 60
    while len(codes) < processes:
        for pid in set(children) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until:
                os.kill(pid, KILL)
        time.sleep(0.02)
    left = sorted(path.name for path in (folder / name).iterdir())
    said = {"name": name, "codes": [codes[pid] for pid in children], "said": log.read_text(), "left": left}
    print(json.dumps(said), flush=True)


def main(folder):
    with contextlib.redirect_stdout(io.StringIO()):
        models.load_base("tiny")  # nothing is trained in this process; what is compiled once need not be in each child
    gc.freeze()  # a collection in a child would copy all of the parent's memory
    run, exact = partial(start, folder), partial(start, folder, dropout=0)
    run("one")
    run("killed", patch=lambda: signalled({0: ("on_substep_end", 4, KILL)}))
    run("killed")
    run("term", patch=lambda: signalled({0: ("on_step_begin", 2, TERM)}))
    run("term")
    run("term")
    run("early", patch=lambda: signalled({0: ("on_train_begin", 0, TERM)}))
    run("late", patch=lambda: signalled({0: ("on_step_begin", 5, TERM)}))
    for name in ("before-the-metrics", "after-the-metrics"):
        shutil.copytree(folder / "one", folder / name)
        shutil.rmtree(folder / name / "final")
        run(name, patch=partial(die_in_the_end, name))
        run(name)
    exact("exact")
    exact("two", 2)
    exact("two-term", 2, lambda: signalled({1: ("on_step_begin", 2, TERM)}))  # one process only, in update 3
    shutil.copytree(folder / "two-term", folder / "to-one")
    exact("two-term", 2)
    exact("to-one")
    apart = {0: ("on_step_begin", 2, TERM), 1: ("on_step_begin", 3, TERM)}  # in updates 3 and 4
    exact("two-apart", 2, lambda: signalled(apart))
    exact("two-killed", 2, lambda: signalled(dict.fromkeys((0, 1), ("on_substep_end", 4, KILL))))
    exact("two-killed", 2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
