"""Which checkpoint of the Trainer was written to its end? The Trainer itself takes the one with the highest number."""

from __future__ import annotations

import json
import pickletools
import re
import warnings
import zipfile
from itertools import pairwise
from pathlib import Path

from safetensors import SafetensorError, safe_open

SCALER = "scaler.pt"
STATE = "trainer_state.json"  # the Trainer writes it last
REQUIRED = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state*.pth", STATE)
ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
SHARDS = "model.safetensors.index.json"
IN_PROGRESS = "checkpoint-is-incomplete.txt"  # transformers' JITCheckpointCallback removes it when a save has ended


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """Return the newest checkpoint in a folder that was written to its end, for `train(resume_from_checkpoint=…)`.

    `resume_from_checkpoint=True` takes the highest number (`transformers.trainer_utils.get_last_checkpoint`), even if
    the process died while that folder was written. This function passes over such a folder and names it in a warning.
    It deletes nothing: the resumed run writes the same files again when it gets there.

    Args:
        output_dir: the `output_dir` of the run's TrainingArguments.

    Returns:
        The path of a folder `checkpoint-N`, or None where no complete one is found or `output_dir` does not exist yet.
        With None the Trainer starts from the beginning.

    Raises:
        NotADirectoryError: `output_dir` is a file.
    """
    output_dir = Path(output_dir)
    if not output_dir.exists():
        return None
    numbered = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output_dir.iterdir() if path.is_dir()]
    for _, path in sorted(((int(match[1]), path) for match, path in numbered if match), reverse=True):
        fault = checkpoint_fault(path)
        if fault is None:
            return str(path)
        warnings.warn(f"{path} is passed over: {fault}", stacklevel=2)
    return None


def checkpoint_fault(checkpoint: str | Path) -> str | None:
    """Say why a run cannot be resumed exactly from a checkpoint, or return None if nothing is found.

    A checkpoint is complete if it has the files that a run is resumed from, if each of them reaches its declared end,
    if its adapter has a tensor, and if its step is the number in its name. A run in fp16 on a GPU must have its loss
    scale too, without which it would start again at 65,536. Nothing is unpickled: of the zip archives that `torch.save`
    writes the directory at their end is read, and the words in two small ones, of a safetensors file the header. Damage
    inside the data is not looked for.

    This holds for the Trainer on one process. Under DDP each process writes a random state, and how many there should
    be is not known here. FSDP and DeepSpeed write other files: their checkpoints count as incomplete. Those of
    `save_only_model=True` do too, since the Trainer would begin with a fresh optimizer and schedule without a word.

    Args:
        checkpoint: a folder `checkpoint-N` in an `output_dir` of the Trainer.
    """
    folder = Path(checkpoint)
    if (folder / IN_PROGRESS).exists():
        return f"{IN_PROGRESS} says that it was being written"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        if not _reaches_its_end(path):
            return f"{path.relative_to(folder).as_posix()} breaks off"

    required = (*REQUIRED, SCALER) if _scales_its_loss(folder) else REQUIRED
    missing = [pattern.replace("*", "") for pattern in required if not any(folder.glob(pattern))]
    adapters = sorted({path.parent for path in files if path.name in ADAPTER})  # further ones lie in their own folders
    parts = [place / name for place in adapters for name in ADAPTER]
    if (folder / SHARDS).exists():
        parts += [folder / name for name in sorted(set(_read_json(folder / SHARDS)["weight_map"].values()))]
    elif not adapters and not (folder / "model.safetensors").exists():
        missing.append("the weights")
    missing += [path.relative_to(folder).as_posix() for path in parts if not path.exists()]
    if missing:
        return f"missing: {', '.join(missing)}"
    for path in (path for path in parts if path.name == ADAPTER[0]):
        with safe_open(path, framework="pt") as tensors:
            if not tensors.keys():
                return f"{path.relative_to(folder).as_posix()} has no tensor in it"

    step = _read_json(folder / STATE).get("global_step")
    return None if folder.name == f"checkpoint-{step}" else f"{STATE} is of step {step}"


def _scales_its_loss(folder: Path) -> bool:
    """Whether the run has fp16=True, and its random state is that of a process with a GPU."""
    settings, random_states = _words(folder / "training_args.bin"), [*folder.glob("rng_state*.pth")]
    fp16 = any(word == "fp16" and value is True for word, value in pairwise(settings))
    return fp16 and any("cuda" in _words(path) for path in random_states)


def _words(path: Path) -> list[object]:
    """Return strings and truth values of a file that `torch.save` wrote, in their order, without unpickling it."""
    if not path.exists():
        return []
    with zipfile.ZipFile(path) as archive:
        [pickled] = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
    values = {"NEWTRUE": True, "NEWFALSE": False}
    words = [values.get(code.name, argument) for code, argument, _ in pickletools.genops(pickled)]
    return [word for word in words if isinstance(word, str | bool)]


def _reaches_its_end(path: Path) -> bool:
    """Whether a file is as long as it says; of a kind that does not say, it is taken as whole."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix in (".pt", ".pth", ".bin"):
            zipfile.ZipFile(path).close()
        elif path.suffix == ".json":
            _read_json(path)
    except (SafetensorError, zipfile.BadZipFile, ValueError):
        return False
    return True


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
