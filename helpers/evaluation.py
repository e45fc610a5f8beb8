"""How good is the model? Exact match by greedy generation, and the loss on completions."""

from __future__ import annotations

from typing import NamedTuple

from helpers.data import encode, prompt_ids
from helpers.loss import label_tokens, token_loss_sum

import pandas as pd
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase


def token_ids(eos_token_id: int | list[int] | None) -> set[int]:
    """Return the ids of a config's eos_token_id, which is one, several or none."""
    return {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or [])


class ExactMatch(NamedTuple):
    """The result of `exact_match`: `score` from 0 to 1, and `rows`, a table of prompt, expected, answer, correct."""

    score: float
    rows: pd.DataFrame


@torch.no_grad()
def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
) -> ExactMatch:
    """Answer every prompt greedily and count the answers that equal the completion after stripping whitespace.

    The model generates as it will for a user: it stops at its own `generation_config.eos_token_id`, and where that is
    not the token that training taught, the answer goes on and is wrong. Answers and completions are compared as the
    tokenizer decodes them, since some change a text on the way (NFC); special tokens are part of an answer.

    Args:
        model: a causal language model, or a PeftModel around one. Its train or eval mode is restored.
        tokenizer, dataset: the model's tokenizer, and string columns `prompt` and `completion`.
        batch_size: prompts generated at once, padded on the left; prompts of similar length go together.
        max_new_tokens: tokens generated at most. By default as many as the longest completion has, and its EOS; an
            answer that needs more cannot be right.
    """
    if len(dataset) == 0:
        raise ValueError("the dataset is empty: there is nothing to evaluate")
    prompts, completions = list(dataset["prompt"]), list(dataset["completion"])
    wanted = tokenizer(completions, add_special_tokens=False).input_ids
    max_new_tokens = max(map(len, wanted)) + 1 if max_new_tokens is None else max_new_tokens
    stops = token_ids(model.generation_config.eos_token_id)
    answers = [""] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(prompts), batch_size):
            chosen = by_length[start : start + batch_size]
            ids = {"input_ids": [prompt_ids(tokenizer, prompts[i]) for i in chosen]}
            inputs = tokenizer.pad(ids, padding_side="left", return_tensors="pt")
            tokens = model.generate(
                input_ids=inputs.input_ids.to(model.device),
                attention_mask=inputs.attention_mask.to(model.device),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
            for i, new in zip(chosen, tokens[:, inputs.input_ids.shape[1] :].tolist(), strict=True):
                end = next((place for place, token in enumerate(new) if token in stops), len(new))
                answers[i] = tokenizer.decode(new[:end])
    finally:
        model.train(was_training)
    rows = pd.DataFrame({"prompt": prompts, "expected": completions, "answer": answers})
    decoded = pd.Series([tokenizer.decode(ids) for ids in wanted], dtype=object)
    rows["correct"] = decoded.str.strip() == rows["answer"].str.strip()
    return ExactMatch(score=float(rows["correct"].mean()), rows=rows)


@torch.no_grad()
def completion_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    batch_size: int = 32,
    max_length: int = 512,
) -> float:
    """Return the mean negative log-likelihood per completion token (EOS included), in nats.

    Every token has the same weight, whatever batch it is in. The perplexity is `math.exp` of it.

    Model, tokenizer and dataset are as for `exact_match`, `max_length` as for `helpers.data.encode`. The batch size
    does not change the result.
    """
    rows = encode(dataset, tokenizer, max_length)
    collate = DataCollatorForSeq2Seq(tokenizer)
    total, tokens = 0.0, 0
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(rows), batch_size):
            batch = collate([rows[i] for i in range(start, min(start + batch_size, len(rows)))]).to(model.device)
            total += token_loss_sum(model, batch).item()
            tokens += label_tokens(batch["labels"])
    finally:
        model.train(was_training)
    return total / tokens
