"""The sample task, encoding and collating."""

import json

from helpers import data
from helpers.makers import sample_task
from helpers.models import load_tokenizer

import pytest

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


def test_splits_have_their_sizes_and_no_duplicate():
    assert {split: len(data.load_commands(split)) for split in SPLITS} == {"train": 400, "validation": 60, "test": 120}
    prompts = [prompt for split in SPLITS for prompt in data.load_commands(split)["prompt"]]
    assert len(set(prompts)) == len(prompts)


def test_no_phrasing_and_no_pair_of_device_and_room_is_in_two_splits():
    for phrasings in (sample_task.SWITCH_PHRASINGS, sample_task.DIAL_PHRASINGS):
        every = [phrasing for split in SPLITS for phrasing in phrasings[split]]
        assert len(set(every)) == len(every)
    pairs = {split: set() for split in SPLITS}
    for split in SPLITS:
        for completion in data.load_commands(split)["completion"]:
            command = json.loads(completion)
            pairs[split].add((command["device"], command["room"]))
        assert pairs[split] <= set(sample_task.device_room_pairs(split))
    assert not pairs["train"] & pairs["test"]
    assert not pairs["train"] & pairs["validation"]
    assert not pairs["validation"] & pairs["test"]


@pytest.mark.parametrize("split", SPLITS)
def test_a_command_says_what_its_request_says(split):
    for row in data.load_commands(split):
        command = json.loads(row["completion"])
        request = row["prompt"].removesuffix("\nJSON:").lower()
        keys = ["device", "room", "action"] + (["value"] if command["action"] == "set" else [])
        assert list(command) == keys
        assert command["device"] in request
        assert command["room"] in request
        words = request.replace(".", " ").replace("?", " ").replace(",", " ").replace(":", " ").split()
        assert str(command["value"] if "value" in command else command["action"]) in words


@pytest.mark.parametrize("split", SPLITS)
def test_the_stored_rows_are_those_of_the_templates(split):
    assert data.load_commands(split).to_list() == sample_task.sample_rows(split)


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match=r"'dev' does not exist; choose one of train, validation, test"):
        data.load_commands("dev")


def test_encode_masks_the_prompt_and_keeps_the_eos(tokenizer):
    row = data.load_commands("train")[0]
    [encoded] = data.encode(data.load_commands("train").select([0]), tokenizer)
    prompt = tokenizer(row["prompt"]).input_ids
    completion = tokenizer(row["completion"]).input_ids
    assert encoded["input_ids"] == [*prompt, *completion, tokenizer.eos_token_id]
    assert encoded["labels"] == [-100] * len(prompt) + [*completion, tokenizer.eos_token_id]
    assert encoded["attention_mask"] == [1] * len(encoded["input_ids"])


def test_encode_truncates_and_refuses_a_row_without_labels(tokenizer):
    rows = data.load_commands("train").select(range(3))
    lengths = [len(tokenizer(prompt).input_ids) for prompt in rows["prompt"]]
    shorter = data.encode(rows, tokenizer, max_length=max(lengths) + 1)
    assert all(len(row["input_ids"]) == len(row["labels"]) <= max(lengths) + 1 for row in shorter)
    assert all(any(label != -100 for label in row["labels"]) for row in shorter)
    too_long = lengths.index(max(lengths)) + 1
    with pytest.raises(ValueError, match=rf"row {too_long}: the prompt alone has {max(lengths)} tokens and max_length"):
        data.encode(rows, tokenizer, max_length=max(lengths))


def test_encode_refuses_what_it_cannot_learn_from(tokenizer):
    rows = data.load_commands("train")
    with pytest.raises(ValueError, match="no column completion"):
        data.encode(rows.remove_columns("completion"), tokenizer)
    with pytest.raises(ValueError, match="empty"):
        data.encode(rows.select([]), tokenizer)
    without_eos = load_tokenizer("tiny")
    without_eos.eos_token = None
    with pytest.raises(ValueError, match="no EOS"):
        data.encode(rows, without_eos)
