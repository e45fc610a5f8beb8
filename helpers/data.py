"""The sample task, JSON Lines in, and the encoding of prompt-completion pairs for training.

The sample task is home automation: a request in English in, one JSON command out. It is generated from templates, so
that it needs no download and its splits can be built to measure generalization: a phrasing, and a pair of device and
room, belongs to one split only. A model that passes the test split has seen neither the sentence nor the pair before.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100  # the label that torch's cross_entropy skips

DEVICES = ("lamp", "fan", "heater", "speaker", "camera", "radio", "oven", "television")
ROOMS = ("kitchen", "bedroom", "bathroom", "office", "hallway", "garage", "nursery", "attic")
# What `set` means for the devices that have a dial: (unit, smallest, largest, step).
DIALS = {
    "lamp": ("percent", 10, 90, 10),
    "fan": ("percent", 10, 90, 10),
    "speaker": ("percent", 10, 90, 10),
    "heater": ("degrees", 16, 25, 1),
    "oven": ("degrees", 120, 240, 20),
}
# {d} device, {r} room, {s} on or off, {v} value, {u} unit.
SWITCH_PHRASINGS = {
    "train": (
        "Turn {s} the {d} in the {r}.",
        "Please switch {s} the {r} {d}.",
        "Could you turn the {d} in the {r} {s}?",
        "I want the {r} {d} {s}.",
        "Switch the {d} {s} in the {r}, please.",
        "The {r} {d} should be {s}.",
        "I would like to have the {d} in the {r} switched {s}.",
        "Make sure that the {r} {d} is {s}.",
        "{r}, {d}: {s}.",
        "{d} {s} in the {r}, please.",
    ),
    "validation": ("Can you switch the {r} {d} {s} for me?", "In the {r}, turn the {d} {s}."),
    "test": (
        "Would you turn {s} the {d} over in the {r}?",
        "Get the {r} {d} switched {s}.",
        "Can we have the {d} {s} in the {r}?",
    ),
}
DIAL_PHRASINGS = {
    "train": (
        "Set the {d} in the {r} to {v} {u}.",
        "Please put the {r} {d} at {v} {u}.",
        "Could you set the {r} {d} to {v} {u}?",
        "I want the {d} in the {r} at {v} {u}.",
        "Change the {d} in the {r} to {v} {u}, please.",
        "The {r} {d} should be at {v} {u}.",
        "I would like to have the {d} in the {r} at {v} {u}.",
        "Make sure that the {r} {d} is at {v} {u}.",
        "{r}, {d}: {v} {u}.",
        "{d} to {v} {u} in the {r}, please.",
    ),
    "validation": ("Can you change the {r} {d} to {v} {u} for me?", "In the {r}, set the {d} to {v} {u}."),
    "test": (
        "Would you put the {d} over in the {r} at {v} {u}?",
        "Get the {r} {d} to {v} {u}.",
        "Can we have the {d} in the {r} at {v} {u}?",
    ),
}
PAIRS_PER_SPLIT = {"train": 42, "validation": 10, "test": 12}  # of the 64 pairs of device and room
ROWS_PER_SPLIT = {"train": 400, "validation": 60, "test": 120}
COMMANDS_SEED = 20260101


def load_commands(split: str) -> Dataset:
    """Return one split of the sample task: a home-automation request in English, and the JSON command that it means.

    The same rows come back on every machine. No phrasing and no (device, room) pair is in two splits. About four rows
    in ten set a dial ("to 40 percent"), the others switch a device on or off.

    Args:
        split: "train" (400 rows), "validation" (60) or "test" (120).

    Returns:
        A `datasets.Dataset` with two string columns. `prompt` is the request, a line break and "JSON:"; `completion`
        is a space and a JSON object without white space, with the keys device, room, action and, for a dial, value.

    Raises:
        ValueError: the split does not exist.
    """
    if split not in ROWS_PER_SPLIT:
        raise ValueError(f"split={split!r} does not exist; choose one of {', '.join(ROWS_PER_SPLIT)}")
    rows = list(_all_commands(split))
    random.Random(f"{COMMANDS_SEED} rows {split}").shuffle(rows)
    switches = [row for row in rows if '"set"' not in row["completion"]]
    dials = [row for row in rows if '"set"' in row["completion"]]
    number_of_dials = ROWS_PER_SPLIT[split] * 2 // 5
    chosen = switches[: ROWS_PER_SPLIT[split] - number_of_dials] + dials[:number_of_dials]
    random.Random(f"{COMMANDS_SEED} order {split}").shuffle(chosen)
    return Dataset.from_list(chosen)


def device_room_pairs(split: str) -> list[tuple[str, str]]:
    """Return the (device, room) pairs that belong to one split of the sample task, disjoint from the other splits'."""
    pairs = [(device, room) for device in DEVICES for room in ROOMS]
    random.Random(f"{COMMANDS_SEED} pairs").shuffle(pairs)
    start = 0
    for name, count in PAIRS_PER_SPLIT.items():
        if name == split:
            return sorted(pairs[start : start + count])
        start += count
    raise ValueError(f"split={split!r} does not exist; choose one of {', '.join(PAIRS_PER_SPLIT)}")


def _all_commands(split: str) -> Iterator[dict[str, str]]:
    for device, room in device_room_pairs(split):
        for phrasing in SWITCH_PHRASINGS[split]:
            for state in ("on", "off"):
                yield _row(
                    phrasing.format(d=device, r=room, s=state), {"device": device, "room": room, "action": state}
                )
        if device in DIALS:
            unit, low, high, step = DIALS[device]
            for phrasing in DIAL_PHRASINGS[split]:
                for value in range(low, high + 1, step):
                    yield _row(
                        phrasing.format(d=device, r=room, v=value, u=unit),
                        {"device": device, "room": room, "action": "set", "value": value},
                    )


def _row(request: str, command: dict[str, str | int]) -> dict[str, str]:
    request = request[0].upper() + request[1:]
    return {"prompt": f"{request}\nJSON:", "completion": " " + json.dumps(command, separators=(",", ":"))}


def load_jsonl(path: str | Path) -> Dataset:
    """Read a JSON Lines file with a `prompt` and a `completion` in each line.

    Blank lines are skipped, other keys are dropped.

    Args:
        path: a UTF-8 file, one JSON object a line, both values non-empty strings.

    Returns:
        A `datasets.Dataset` with the string columns `prompt` and `completion`, in the file's order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has no rows, or a line is not such an object; the message names file and line.
    """
    path = Path(path)
    rows = []
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        where = f"{path}, line {number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(row, dict):
            raise ValueError(
                f'{where}: expected an object {{"prompt": …, "completion": …}}, found {type(row).__name__}'
            )
        for key in ("prompt", "completion"):
            if key not in row:
                raise ValueError(f"{where}: the key {key!r} is missing; found {', '.join(map(repr, row)) or 'no keys'}")
            if not isinstance(row[key], str) or not row[key].strip():
                raise ValueError(f"{where}: {key!r} must be a non-empty string, found {row[key]!r}")
        rows.append({"prompt": row["prompt"], "completion": row["completion"]})
    if not rows:
        raise ValueError(f'{path}: no rows; write one {{"prompt": …, "completion": …}} object a line')
    return Dataset.from_list(rows)


def encode(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int = 512) -> Dataset:
    """Turn prompts and completions into token ids and labels for causal-language-model training.

    Prompt and completion are tokenized apart, so that the prompt's ids are those that generation will see, and joined
    as prompt + completion + EOS. The labels are the input ids with the prompt replaced by -100: the loss is taken on
    the completion and on the EOS, which teaches the model to stop. (The model itself shifts the labels by one.)
    A row that is too long loses the end of its completion.

    Args:
        dataset: columns `prompt` and `completion`.
        tokenizer: a tokenizer with an `eos_token_id`.
        max_length: tokens kept of each row.

    Returns:
        A `Dataset` with the integer lists `input_ids`, `attention_mask` and `labels`, each (tokens,), at most
        `max_length` long.

    Raises:
        ValueError: the dataset is empty or a column is missing, the tokenizer has no EOS, or the prompt of a row fills
            `max_length`, so that no label is left to learn from; the message counts the rows from 1.
    """
    missing = {"prompt", "completion"} - set(dataset.column_names)
    if missing:
        raise ValueError(f"the dataset has no column {', '.join(sorted(missing))}; it has {dataset.column_names}")
    if len(dataset) == 0:
        raise ValueError("the dataset is empty: there is nothing to encode")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token: the model could not learn to stop. Set tokenizer.eos_token")
    rows = []
    for number, row in enumerate(dataset, start=1):
        prompt = tokenizer(row["prompt"]).input_ids
        completion = [*tokenizer(row["completion"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        if len(prompt) >= max_length:
            raise ValueError(
                f"row {number}: the prompt alone has {len(prompt)} tokens and max_length is {max_length}, so nothing "
                "is left to learn from; raise max_length or shorten the prompt"
            )
        input_ids = (prompt + completion)[:max_length]
        labels = ([IGNORE_INDEX] * len(prompt) + completion)[:max_length]
        rows.append({"input_ids": input_ids, "attention_mask": [1] * len(input_ids), "labels": labels})
    return Dataset.from_list(rows)


class Collator:
    """Pad encoded rows to the longest of the batch, on the right.

    Args:
        tokenizer: its `pad_token_id` (or else its `eos_token_id`) fills `input_ids`; padding is masked out of the
            attention and of the loss, so its value does not matter.

    Calling it with a list of rows from `encode` returns a dict of int64 tensors (batch, longest): `input_ids`,
    `attention_mask` (0 on padding) and `labels` (-100 on padding).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        fill = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORE_INDEX}
        longest = max(len(row["input_ids"]) for row in rows)
        return {
            key: torch.tensor([list(row[key]) + [value] * (longest - len(row[key])) for row in rows])
            for key, value in fill.items()
        }


class LabelColumns(Collator):
    """Pad rows on the left, and ask for logits only in those columns of the batch that predict a label in some row.

    A row ends with its completion, so with the padding on the left the completions share their columns. To what
    `Collator` returns this adds `logits_to_keep`, the columns' numbers, and `shift_labels`, for each kept
    logit the label that it is scored with. Transformers' causal models take both.
    """

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        reversed_rows = [{name: values[::-1] for name, values in row.items()} for row in rows]
        batch = {name: padded.flip(1) for name, padded in super().__call__(reversed_rows).items()}
        following = batch["labels"][:, 1:]  # the label at t + 1 is predicted at t
        batch["logits_to_keep"] = (following != IGNORE_INDEX).any(dim=0).nonzero().flatten()
        batch["shift_labels"] = following[:, batch["logits_to_keep"]]
        return batch
