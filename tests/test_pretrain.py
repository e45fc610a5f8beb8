"""The text that tiny is pretrained on, and the script."""

import functools
import itertools
import json
import re
import sys

from helpers import data, models
from helpers.makers import pretrain_tiny
from helpers.makers.pretrain_tiny import SEED
from helpers.makers.small_world import HELD_OUT_SEED, TASK_KEYS, documents

import pytest

pytestmark = pytest.mark.slow
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def some_documents():
    return list(itertools.islice(documents(SEED), 30_000))


def test_the_text_is_reproducible_and_seeds_differ(some_documents):
    assert list(itertools.islice(documents(SEED), 100)) == some_documents[:100]
    assert list(itertools.islice(documents(HELD_OUT_SEED), 100)) != some_documents[:100]


def test_the_sample_task_is_not_in_the_text(some_documents):
    text = "\n".join(some_documents)
    for split in SPLITS:
        for row in data.load_commands(split):
            assert row["prompt"] not in text
            assert row["completion"].strip() not in text
    for line in text.splitlines():
        record = re.search(r"\{.*\}", line)
        if record:
            facts = json.loads(record[0])
            about_a_home = set(map(str, facts.values())) & set(data.ROOMS) and set(map(str, facts.values())) & set(
                data.DEVICES
            )
            assert not (about_a_home and set(facts) & set(TASK_KEYS)), line


def test_every_word_of_the_sample_task_is_in_the_text(some_documents):
    """A frozen embedding of a word that was never seen cannot be adapted to."""
    known = set(re.findall(r"[A-Za-z]+", "\n".join(some_documents)))
    rows = [row for split in SPLITS for row in data.load_commands(split)]
    needed = set(re.findall(r"[A-Za-z]+", "\n".join(row["prompt"] + row["completion"] for row in rows)))
    assert needed <= known


def test_the_shipped_curve_is_of_the_shipped_recipe():
    record = json.loads((models.TINY / "training.json").read_text())
    recipe = record["recipe"]
    for name in ("SEED", "BATCH_SIZE", "SEQUENCE_LENGTH", "LEARNING_RATE", "WARMUP_STEPS", "WEIGHT_DECAY"):
        assert recipe[name.lower()] == getattr(pretrain_tiny, name)
    assert record["loss_curve"][-1]["step"] == recipe["steps"]
    assert record["loss_curve"][-1]["loss"] < 0.4 * record["loss_curve"][0]["loss"]


def test_the_script_runs(tmp_path, monkeypatch):
    few = functools.partial(pretrain_tiny.held_out_perplexity, count=20)  # 400 documents take a quarter of a minute
    monkeypatch.setattr(pretrain_tiny, "held_out_perplexity", few)
    monkeypatch.setattr(sys, "argv", ["pretrain_tiny", "--steps", "8", "--output", str(tmp_path / "new")])
    pretrain_tiny.main()
    shipped = {file.name for file in models.TINY.iterdir()}
    assert {file.name for file in (tmp_path / "new").iterdir()} == shipped
    for name in ("tokenizer.json", "config.json"):  # the tokenizer is rebuilt to the letter
        new, old = (json.loads((folder / name).read_text()) for folder in (tmp_path / "new", models.TINY))
        new.pop("transformers_version", None), old.pop("transformers_version", None)
        assert new == old, name
    record = json.loads((tmp_path / "new" / "training.json").read_text())
    assert record["held_out_perplexity"]["trained"] < record["held_out_perplexity"]["untrained"]
