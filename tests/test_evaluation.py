"""Exact match and the loss on completions."""

import copy
import math

from helpers import data, evaluation
from helpers.models import load_base, load_tokenizer

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from tokenizers import normalizers
from transformers import GenerationConfig


@pytest.fixture(scope="module")
def tiny():
    return load_base("tiny", device="cpu"), load_tokenizer("tiny")


def _what_the_model_says(model, tokenizer, prompt, tokens):
    """Greedy decoding written out: one prompt, no padding, no cache."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    start = ids.shape[1]
    for _ in range(tokens):
        with torch.no_grad():
            best = model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
        if best == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, best.view(1, 1)], dim=1)
    return tokenizer.decode(ids[0, start:])


def test_batched_generation_answers_as_one_prompt_at_a_time(tiny):
    model, tokenizer = tiny
    prompts = ["Anna bought", "On Monday the kitchen lamp was", "The", '["lamp","fan","rope"]\n["lamp",']
    dataset = Dataset.from_dict({"prompt": prompts, "completion": ["four words of text"] * 4})
    result = evaluation.exact_match(model, tokenizer, dataset, batch_size=3, max_new_tokens=12)
    expected = [_what_the_model_says(model, tokenizer, prompt, 12) for prompt in prompts]
    assert result.rows["answer"].tolist() == expected
    assert result.score == 0.0

    right = dataset.remove_columns("completion").add_column("completion", [*expected[:3], "wrong"])
    again = evaluation.exact_match(model, tokenizer, right, batch_size=2, max_new_tokens=12)
    assert again.score == 0.75
    assert isinstance(again.rows, pd.DataFrame)
    assert again.rows["correct"].tolist() == [True, True, True, False]


class Says:
    """A model that answers with these texts, and then with its EOS or, if it has another, with more text."""

    def __init__(self, tokenizer, answers, eos):
        self.tokenizer, self.answers, self.training, self.device = tokenizer, answers, False, "cpu"
        self.generation_config = GenerationConfig(eos_token_id=eos)

    def eval(self):
        pass

    def train(self, mode):
        pass

    def generate(self, input_ids, max_new_tokens, pad_token_id, **options):
        rows = []
        for prompt in self.tokenizer.batch_decode(input_ids, skip_special_tokens=True):
            ids = self.tokenizer(self.answers[prompt], add_special_tokens=False).input_ids
            stops = self.tokenizer.eos_token_id in np.atleast_1d(self.generation_config.eos_token_id)
            rest = [pad_token_id] if stops else ids
            rows.append(([*ids, self.tokenizer.eos_token_id] + rest * max_new_tokens)[:max_new_tokens])
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)


def test_a_model_that_never_stops_is_wrong_and_one_that_says_the_completion_is_right(tiny):
    _, tokenizer = tiny
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>"]})
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    answers = {"a:": " cafe\u0301 ﬁne", "b:": " <|call|> x", "c:": " on"}
    rows = Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in answers.items()])
    for eos, score in ((tokenizer.eos_token_id, 1.0), (7, 0.0), ([7, tokenizer.eos_token_id], 1.0)):
        assert evaluation.exact_match(Says(tokenizer, answers, eos), tokenizer, rows).score == score, eos
    assert evaluation.exact_match(Says(tokenizer, dict.fromkeys(answers, " on"), 0), tokenizer, rows).score == 1 / 3


def test_evaluation_leaves_mode_and_tokenizer_alone(tiny):
    model, tokenizer = tiny
    rows = data.load_commands("validation").select(range(4))
    side = tokenizer.padding_side
    for training in (True, False):
        model.train(training)
        evaluation.exact_match(model, tokenizer, rows)
        evaluation.completion_loss(model, tokenizer, rows)
        assert model.training is training
    assert tokenizer.padding_side == side
    model.eval()


def test_completion_loss_is_the_mean_over_all_completion_tokens(tiny):
    model, tokenizer = tiny
    rows = data.load_commands("validation").select(range(11))
    total, count = 0.0, 0
    for row in rows:  # by hand, one row at a time, without padding, in float64
        prompt = tokenizer(row["prompt"]).input_ids
        answer = [*tokenizer(row["completion"]).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double()
        log_probabilities = logits.log_softmax(-1)
        for position, token in enumerate(answer, start=len(prompt)):
            total -= log_probabilities[position - 1, token].item()
            count += 1
    for batch_size in (1, 4, 32):
        loss = evaluation.completion_loss(model, tokenizer, rows, batch_size=batch_size)
        assert math.isclose(loss, total / count, rel_tol=1e-5)


def test_an_empty_dataset_is_refused(tiny):
    with pytest.raises(ValueError, match="empty"):
        evaluation.exact_match(*tiny, data.load_commands("test").select([]))
