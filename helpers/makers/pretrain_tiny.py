"""Pretrain the `tiny` base model from nothing: `python -m helpers.makers.pretrain_tiny --output FOLDER`.

The recipe is all in this file and in `small_world.py`: a byte-level BPE tokenizer in which a word is the same token
with and without a space before it, a Llama of about a million parameters, and AdamW with a cosine schedule. It writes
the folder that `helpers.models` ships: weights (safetensors), tokenizer, configuration, and `training.json` with the
recipe, the loss curve and the perplexities.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

from helpers.labs.learning_rate import text_loss
from helpers.makers.small_world import HELD_OUT_SEED, documents

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

SEED = 0
VOCABULARY = 768
SEQUENCE_LENGTH = 128
BATCH_SIZE = 32
LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.1
RANDOM_COPY_SHARE = 0.1  # of a batch's rows: random tokens, repeated
EOS = "<|end|>"
PAD = "<|pad|>"


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer: byte-level BPE over words, single digits and runs of other characters."""
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r"[A-Za-z]+|[0-9]|[^A-Za-z0-9]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.islice(documents(SEED), 20_000), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def new_model(vocabulary: int, eos_token_id: int, pad_token_id: int) -> LlamaForCausalLM:
    """Return the untrained model: a Llama with 4 layers of width 128 and tied embeddings."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
    return LlamaForCausalLM(config)


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[torch.Tensor]:
    """Yield batches (BATCH_SIZE, SEQUENCE_LENGTH) of token ids: packed documents, and some rows of repeated tokens."""
    generator = torch.Generator().manual_seed(seed)
    stream = documents(seed)
    buffer: list[int] = []
    random_rows = round(BATCH_SIZE * RANDOM_COPY_SHARE)
    needed = (BATCH_SIZE - random_rows) * SEQUENCE_LENGTH
    while True:
        while len(buffer) < needed:
            for ids in tokenizer(list(itertools.islice(stream, 64))).input_ids:
                buffer += [*ids, tokenizer.eos_token_id]
        rows = [torch.tensor(buffer[:needed]).view(-1, SEQUENCE_LENGTH)]
        buffer = buffer[needed:]
        for _ in range(random_rows):
            period = int(torch.randint(4, SEQUENCE_LENGTH // 2, (), generator=generator))
            tokens = torch.randint(2, len(tokenizer), (period,), generator=generator)
            rows.append(tokens.repeat(SEQUENCE_LENGTH // period + 1)[None, :SEQUENCE_LENGTH])
        yield torch.cat(rows)


def held_out_perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int = 400) -> float:
    """Return exp(mean negative log-likelihood per token) on `count` documents of another seed, one at a time."""
    return math.exp(text_loss(model, tokenizer, list(itertools.islice(documents(HELD_OUT_SEED), count))))


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> list[dict[str, float]]:
    """Train with AdamW and a cosine schedule, and return the mean loss of every 50 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP_STEPS, steps)
    curve: list[dict[str, float]] = []
    running: list[float] = []
    started = time.perf_counter()
    for step, input_ids in enumerate(itertools.islice(batches(tokenizer, SEED), steps), start=1):
        loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        running.append(loss.item())
        if step % 50 == 0 or step == steps:
            curve.append({"step": step, "loss": round(sum(running) / len(running), 4)})
            running = []
            print(f"step {step:5d}  loss {curve[-1]['loss']:.3f}  {time.perf_counter() - started:.0f} s", flush=True)
    return curve


def main() -> None:
    """Run the recipe from the command line."""
    parser = argparse.ArgumentParser(description="Pretrain the tiny base model and write its folder.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=4000)
    arguments = parser.parse_args()

    torch.manual_seed(SEED)
    tokenizer = train_tokenizer()
    model = new_model(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    untrained = held_out_perplexity(model, tokenizer)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters; untrained perplexity {untrained:.1f}", flush=True
    )

    started = time.perf_counter()
    curve = train(model, tokenizer, arguments.steps)
    perplexity = held_out_perplexity(model, tokenizer)
    arguments.output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    record = {
        "recipe": {
            "seed": SEED,
            "steps": arguments.steps,
            "batch_size": BATCH_SIZE,
            "sequence_length": SEQUENCE_LENGTH,
            "learning_rate": LEARNING_RATE,
            "warmup_steps": WARMUP_STEPS,
            "weight_decay": WEIGHT_DECAY,
        },
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "held_out_perplexity": {"untrained": round(untrained, 1), "trained": round(perplexity, 2)},
        "loss_curve": curve,
    }
    (arguments.output / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"held-out perplexity {untrained:.1f} -> {perplexity:.2f}; written to {arguments.output}")


if __name__ == "__main__":
    main()
