"""The sample task, its encoding as prompt and completion, and a batch with fewer logits.

The sample task is home automation; `helpers.makers.sample_task` made its files from templates.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

IGNORE_INDEX = -100  # the label that torch's cross_entropy skips
SAMPLE_TASK = Path(__file__).parent / "assets" / "sample_task"
SPLITS = ("train", "validation", "test")
DEVICES = ("lamp", "fan", "heater", "speaker", "camera", "radio", "oven", "television")
ROOMS = ("kitchen", "bedroom", "bathroom", "office", "hallway", "garage", "nursery", "attic")


def load_commands(split: str) -> Dataset:
    """Return one split of the sample task: a home-automation request in English, and the JSON command that it means.

    No phrasing and no pair of device and room is in two splits. About four rows in ten set a dial ("to 40 percent"),
    the others switch a device on or off.

    Args:
        split: "train" (400 rows), "validation" (60) or "test" (120).

    Returns:
        A `datasets.Dataset` with two string columns. `prompt` is the request, a line break and "JSON:"; `completion`
        is a space and a JSON object without white space, with the keys device, room, action and, for a dial, value.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} does not exist; choose one of {', '.join(SPLITS)}")
    with (SAMPLE_TASK / f"{split}.jsonl").open(encoding="utf-8") as lines:
        return Dataset.from_list([json.loads(line) for line in lines])


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
        A `Dataset` with the integer lists `input_ids`, `attention_mask` and `labels`, each (tokens,).

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


class LogitsToKeepCollator(DataCollatorForSeq2Seq):
    """Left-pad, and compute logits only at positions that predict a label (`logits_to_keep`).

    A row ends with its completion, so with the padding on the left the completions share their positions. To a padded
    batch of T tokens this adds `logits_to_keep` (kept,), the positions that predict a label in some row, and
    `shift_labels` (batch, kept), the label of each kept logit. Transformers' causal models take both.

    Args:
        tokenizer: as for `transformers.DataCollatorForSeq2Seq`; it is not changed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        left = copy.copy(tokenizer)
        left.padding_side = "left"
        super().__init__(left, label_pad_token_id=IGNORE_INDEX)

    def __call__(self, rows: list[dict[str, Any]], return_tensors: str | None = None) -> dict[str, torch.Tensor]:
        batch = super().__call__(rows, return_tensors)
        following = batch["labels"][:, 1:]  # (batch, T - 1): the label at t + 1 is predicted at t
        batch["logits_to_keep"] = (following != IGNORE_INDEX).any(dim=0).nonzero().flatten()
        batch["shift_labels"] = following[:, batch["logits_to_keep"]]
        return batch
