"""Atomic writes: a file or folder has its name only when all of it is written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """Yield a new folder beside `target`, and give it that name when the block has ended without an error.

    Until then it is called "<target>.unfinished", so that a run that fails or is killed leaves nothing that looks
    finished. A block that raises removes its folder; one that was killed leaves it to the next call.

    Raises:
        FileExistsError: `target` exists; it is never overwritten.
    """
    target = Path(target)
    if target.exists():
        raise FileExistsError(f"{target} exists already; remove it, or choose another name")
    unfinished = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def atomic_write_text(file: Path, text: str) -> None:
    """Write UTF-8 beside a file, then rename: a reader sees the old file or the new one, and never half of it."""
    beside = file.with_name(f"{file.name}.partial")
    beside.write_text(text, encoding="utf-8")
    beside.replace(file)
