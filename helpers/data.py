"""The sample task, its encoding as prompt and completion, and a batch with fewer logits.

The sample task is home automation; `helpers.makers.sample_task` made its files from templates.
"""

from __future__ import annotations

import copy
import json
import warnings
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

    A row is prompt + completion + EOS. The prompt's ids are those that generation will see; the completion's are what
    follows them in the text as a whole, or, where a token would reach over the boundary, its own. The labels are the
    input ids with the prompt replaced by -100: the loss is taken on the completion and on the EOS, which teaches the
    model to stop. (The model itself shifts the labels by one.) A row that is too long loses the end of its completion,
    and a warning says how many do.

    Args:
        dataset: columns `prompt` and `completion`; and `answers`, if there is one, [start, end] of the parts of the
            prompt, in characters, that are learned as well: earlier answers of a conversation.
        tokenizer: a tokenizer with an `eos_token_id`. An EOS that it adds to every text is left out of the prompt.
        max_length: tokens kept of each row.

    Returns:
        A `Dataset` with the integer lists `input_ids`, `attention_mask` and `labels`, each (tokens,).

    Raises:
        ValueError: the dataset is empty or a column is missing, the tokenizer has no EOS, or in some row the prompt
            fills `max_length`, so that no label is left to learn from, it begins with two BOS, or its end and the
            completion give another text apart than together; the message counts the rows from 1.
    """
    missing = {"prompt", "completion"} - set(dataset.column_names)
    if missing:
        raise ValueError(f"the dataset has no column {', '.join(sorted(missing))}; it has {dataset.column_names}")
    if len(dataset) == 0:
        raise ValueError("the dataset is empty: there is nothing to encode")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token: the model could not learn to stop. Set tokenizer.eos_token")
    rows, full, cut = [], {}, 0
    for number, row in enumerate(dataset, start=1):
        try:
            prompt, completion = _prompt_and_completion(row["prompt"], row["completion"], tokenizer)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from None
        labels = [IGNORE_INDEX] * len(prompt) + completion
        answers = row.get("answers") or []
        offsets = tokenizer(row["prompt"], return_offsets_mapping=True).offset_mapping[: len(prompt)] if answers else []
        for start, end in answers:
            inside = [i for i, (left, right) in enumerate(offsets) if left < end and right > start]
            labels[inside[0] : inside[-1] + 1] = prompt[inside[0] : inside[-1] + 1]
        input_ids, labels = (prompt + completion)[:max_length], labels[:max_length]
        if all(label == IGNORE_INDEX for label in labels):
            full[number] = len(prompt)
        cut += len(prompt) + len(completion) > max_length
        rows.append({"input_ids": input_ids, "attention_mask": [1] * len(input_ids), "labels": labels})
    if full:
        (number, length), more = next(iter(full.items())), len(full) - 1
        raise ValueError(
            f"row {number}{f' and {more} more' if more else ''}: the prompt alone has {length} tokens and max_length "
            f"is {max_length}, so nothing is left to learn from; raise max_length or shorten the prompt"
        )
    if cut:
        warnings.warn(
            f"{cut} of {len(rows)} rows have more than {max_length} tokens and lost their end, EOS included, so they "
            "teach the model not to stop; raise max_length or leave them out",
            stacklevel=2,
        )
    return Dataset.from_list(rows)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the ids of a prompt that an answer shall follow: a BOS if the tokenizer adds one, but no EOS."""
    ids = tokenizer(prompt).input_ids
    if ids[-1:] == [tokenizer.eos_token_id] and not prompt.endswith(tokenizer.eos_token):
        return ids[:-1]
    return ids


def _prompt_and_completion(
    prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    before, whole = prompt_ids(tokenizer, prompt), prompt_ids(tokenizer, prompt + completion)
    if tokenizer.bos_token_id is not None and before[:2] == [tokenizer.bos_token_id] * 2:
        raise ValueError(
            f"the prompt begins with {tokenizer.bos_token}, and the tokenizer adds another; remove it from the prompt"
        )
    after = whole[len(before) :]
    if whole[: len(before)] != before or not after:  # a token reaches over the boundary
        after = tokenizer(completion, add_special_tokens=False).input_ids
        if tokenizer.decode(before + after) != tokenizer.decode(whole):
            raise ValueError(
                "tokenized apart, prompt and completion do not give the text that they are together (the tokenizer "
                "adds a space, say); end the prompt without a space, and begin the completion with it"
            )
    return before, [*after, tokenizer.eos_token_id]


class LogitsToKeepCollator(DataCollatorForSeq2Seq):
    """Left-pad, and compute logits only at positions that predict a label (`logits_to_keep`).

    A row ends with its completion, so with the padding on the left the completions share their positions. To a padded
    batch of T tokens this adds `logits_to_keep` (kept,), the positions that predict a label in some row, and
    `shift_labels` (batch, kept), the label of each kept logit. Transformers' causal models take both.

    `position_ids` count from each row's first token, for models that learn a vector for each place (GPT-2).

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
        batch["position_ids"] = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)  # (batch, T)
        return batch
