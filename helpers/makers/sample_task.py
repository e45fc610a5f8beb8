"""The sample task, home automation, made from templates: `python -m helpers.makers.sample_task` writes it again.

Its splits are built to measure generalization: a phrasing, and a pair of device and room, belongs to one split only. A
model that passes the test split has seen neither the sentence nor the pair before.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

from helpers.data import DEVICES, ROOMS, SAMPLE_TASK

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


def sample_rows(split: str) -> list[dict[str, str]]:
    """Return the rows of one split: the same on every machine. Four in ten set a dial ("to 40 percent")."""
    rows = list(_all_commands(split))
    random.Random(f"{COMMANDS_SEED} rows {split}").shuffle(rows)
    switches = [row for row in rows if '"set"' not in row["completion"]]
    dials = [row for row in rows if '"set"' in row["completion"]]
    number_of_dials = ROWS_PER_SPLIT[split] * 2 // 5
    chosen = switches[: ROWS_PER_SPLIT[split] - number_of_dials] + dials[:number_of_dials]
    random.Random(f"{COMMANDS_SEED} order {split}").shuffle(chosen)
    return chosen


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


def main() -> None:
    """Write the three files."""
    for split in ROWS_PER_SPLIT:
        text = "".join(json.dumps(row) + "\n" for row in sample_rows(split))
        (SAMPLE_TASK / f"{split}.jsonl").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
