"""The sweep behind notebook 06: `python -m helpers.makers.sweep_learning_rate [--part NAME]`.

It does the runs that `helpers.labs.learning_rate` describes and writes `runs.jsonl`, one JSON object a line, and
`record.json`: with which versions and on what kind of machine. A run that is in the file is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from helpers.finetune.folders import atomic_write_text
from helpers.hardware import profile
from helpers.labs import learning_rate

import torch


def sweep(parts: Sequence[str], folder: Path) -> None:
    """Do the runs of the parts that are not in the folder yet. It is written after each, so a sweep can be stopped.

    Raises:
        ValueError: there is no such part in `PARTS`.
    """
    wanted, rows = learning_rate.runs_of(parts), learning_rate.read_stored(folder)
    missing = [run for run in wanted if run not in rows]
    print(f"{len(missing)} of {len(wanted)} runs to do", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    record, started = folder / "record.json", time.perf_counter()
    sessions = json.loads(record.read_text(encoding="utf-8")) if record.exists() else []
    for number, run in enumerate(missing, start=1):
        rows[run] = asdict(run) | learning_rate.train_once(run)
        minutes = round((time.perf_counter() - started) / 60, 1)
        lines = [json.dumps(rows[run]) + "\n" for run in sorted(rows, key=astuple)]
        atomic_write_text(folder / "runs.jsonl", "".join(lines))
        session = {"parts": list(parts), "runs": number, "minutes": minutes} | _circumstances()
        atomic_write_text(record, json.dumps([*sessions, session], indent=1) + "\n")
        print(f"{number} of {len(missing)}, {minutes} min: loss {rows[run]['validation_loss']}, {run}", flush=True)


def _circumstances() -> dict[str, object]:
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{profile().device}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
    }


def main() -> None:
    """Run the sweep from the command line."""
    parser = argparse.ArgumentParser(description="Train at many learning rates and store the losses.")
    parser.add_argument(
        "--part", action="append", choices=list(learning_rate.PARTS), help="only this part; may be repeated"
    )
    parser.add_argument(
        "--output", type=Path, default=learning_rate.RESULTS, help="folder of runs.jsonl, to make or to go on with"
    )
    arguments = parser.parse_args()
    sweep(arguments.part or list(learning_rate.PARTS), arguments.output)


if __name__ == "__main__":
    main()
