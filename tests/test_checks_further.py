"""Answers to the exercises of notebooks 04 to 06 and 10 to 12 that are not among the mistakes of the data."""

import hashlib
import itertools
import math
import random
import zlib

from helpers.checks import clinic, learning_rate, own_data, scale_out, trainer, training_loops

import numpy as np
import pytest
import torch
from exercises import exercise_functions
from test_checks import said
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

RIGHT = ""  # a right answer by another way
adamw, fp16, halving = training_loops._adamw, training_loops._fp16, learning_rate._halving
recipe, updates, ring = learning_rate._recipe, scale_out._updates, scale_out._ring


def solved(module, name, then=lambda *case: None):
    """Return the right answer, which does something else too."""

    def function(*case):
        result = getattr(module, name).right(*case)
        then(*case)
        return result

    return function


def adamw_decay_last(weight, gradient, m, v, t, lr, decay):
    new, m, v = adamw()(weight, gradient, m, v, t, lr, 0.0)
    return new - lr * decay * weight, m.float(), v


def clip_in_place(gradients, max_norm):
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    return [g.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0)) for g in gradients]


def normal_interval(before, after, draws, seed):
    change = np.array(after, dtype=float) - np.array(before, dtype=float)
    error = 1.96 * change.std() / len(change) ** 0.5
    return np.array([change.mean() - error, change.mean() + error])


def loop_interval(before, after, draws, seed):
    rng, n = random.Random(seed), len(before)
    means = sorted(sum(after[i] - before[i] for i in rng.choices(range(n), k=n)) / n for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


def every_pair(train, test):
    return [i for i, text in enumerate(test) if any(other.lower().split() == text.lower().split() for other in train)]


def first_weight(weights):
    name = min(name for name in weights if "lora_" not in name)
    return hashlib.sha256(weights[name].contiguous().numpy().tobytes()).hexdigest()


ANSWERS = {
    training_loops: [
        ("adamw_update", adamw_decay_last, RIGHT),
        ("adamw_update", adamw(below=lambda v, v_hat, c: v_hat.sqrt() + 1e-6), "After update 1 weight 4 should be"),
        ("adamw_update", adamw(sign=-2), "After update 1 weight 0 should be 1.8000, and it is 1.7000"),
        ("adamw_update", lambda w, g, m, *rest: (w.sum(), m, m), "shape (), expected (5,)"),
        ("clip_gradients", clip_in_place, RIGHT),
        ("clip_gradients", training_loops._times(lambda g, gs, n: n / training_loops._norm(gs)), "scales them up"),
        ("clip_gradients", lambda gs, n: [g / 2 for g in gs], "Our first entry should be"),
        ("clip_gradients", lambda gs, n: torch.cat([g.flatten() for g in gs]), "a list with one tensor for each"),
        ("cosine_factor", lambda *case: torch.tensor(training_loops._cosine()(*case)), RIGHT),
        ("cosine_factor", lambda i, w, n: torch.tensor(2.0), "the factor is 0.0000, and it says 2.0000"),
        ("fp16_update", fp16("zero backward unscale clip step update zero"), RIGHT),
        ("fp16_update", fp16("backward clip step update unscale zero"), "comes after the step"),
        ("fp16_update", fp16("backward unscale unscale step update"), "raised RuntimeError: unscale_() has already"),
    ],
    trainer: [
        ("resume_from", solved(trainer, "resume_from", lambda found, needed: found.clear()), RIGHT),
        ("resume_from", lambda *case: trainer._newest(*case) or "", "complete, the answer is None, and it says ''"),
        ("token_accuracy", lambda *case: torch.tensor(trainer.token_accuracy.right(*case)), "return float"),
        ("token_accuracy", lambda *case: trainer.token_accuracy.right(*case) / 2, "On our rows it should be"),
        ("early_stopping", lambda losses, patience: (len(losses), 5), "it is (8, 5), and it says (9, 5)"),
        ("early_stopping", lambda *case: trainer._stopped()(*case) if case[1] < 3 else None, "also for a run that"),
        ("diverged", lambda logs: ~np.isfinite(list(logs.values())).all(), RIGHT),
        ("diverged", lambda logs: logs.get("learning_rate") or None, "return True or False"),
    ],
    learning_rate: [
        ("valley", lambda *case: torch.tensor(learning_rate.valley.right(*case), dtype=torch.float64), RIGHT),
        ("valley", lambda r, x: r[0] if r[0] == 2e-3 else learning_rate.valley.right(r, x), "rates [0.002, 0.01"),
        ("same_first_step", lambda *case: 1.0, "alpha 16 -> 32, r 8 -> 4 and rslora=False it is 0.0005, not 1."),
        ("better_recipe", solved(learning_rate, "better_recipe", lambda a, b: a.clear()), RIGHT),
        ("better_recipe", recipe(bound=0, error=lambda x, y: 0, sign=-1), "the higher loss. (a ="),
        ("better_recipe", lambda a, b: "both", "It returns 'both'; return"),
        ("successive_halving", lambda train, rates, steps: (rates[0], 0), "It trains nothing"),
        ("successive_halving", lambda train, rates, steps: train(rates[0], steps), "return the rate that is left"),
        ("successive_halving", lambda train, rates, steps: (train(rates[0], steps), 1), "first round trains"),
        ("successive_halving", halving(grow=3), "The rounds have [10, 30, 90] steps; they should have [10, 20, 40]"),
        ("successive_halving", halving(keep=lambda n: n // 2), "the rounds train [6, 3, 2], and it trains [6, 3]"),
        ("successive_halving", lambda *case: (halving()(*case)[0], 40), "40 steps; together its runs took 200"),
        ("successive_halving", lambda *case: (case[1][0], halving()(*case)[1]), "the rate that is left is 0.003"),
    ],
    clinic: [
        ("triage", lambda log: "Diverged", "It returns 'Diverged'; return one of 'diverged'"),
        ("triage", clinic._triage("dead", limit=0.0), "are 0, it should say 'no labels', and it says 'healthy'"),
        ("triage", lambda log: clinic._triage()([log.pop(0), *log]), "in place: work on a copy"),
        ("leaked", clinic._leaked(lambda text: tuple(text.casefold().split())), RIGHT),
        ("leaked", every_pair, "convert each text once"),
        ("leaked", lambda train, test: [test[0]], "It returns texts"),
        ("leaked", lambda *case: clinic._leaked()(*case)[::-1], "in rising order"),
        ("leaked", lambda train, test: [0, 1, 2, 8], "is a copy too"),
        ("leaked", lambda train, test: [0, 1, 2, 3, 7, 8], "'Turn off the fan.' is not in train"),
        ("fingerprint", clinic._fingerprint(order=lambda plain: sorted(plain, reverse=True)), RIGHT),
        ("fingerprint", lambda weights: b"base", "It returns bytes; return the hexadecimal digits"),
        ("fingerprint", first_weight, "the fingerprint is the same"),
        ("fingerprint", clinic._fingerprint(content=lambda t: t.view(torch.uint8).numpy().tobytes()), "RuntimeError"),
        ("fingerprint", lambda weights: [t.zero_() for n, t in weights.items() if "lora_" in n] or "", "changes"),
    ],
    scale_out: [
        ("updates_in_an_epoch", lambda *case: list(map(int, updates()(*case))), RIGHT),
        ("updates_in_an_epoch", updates(lambda n, b, s, p: 99 if n == 41 else -(-scale_out._rounds(n, b, p) // s)),
         "For 41 rows, micro-batches of 2, 4 steps and 4 processes there are 2 updates; it says 99"),
        ("updates_in_an_epoch", updates(filled=lambda n, b, s, p: 1), "8 rows are filled in, and it says 1"),
        ("updates_in_an_epoch", updates(lambda n, b, s, p: n / 7), "both are whole numbers"),
        ("loss_factors", lambda tokens: torch.tensor(tokens) / torch.tensor(tokens, dtype=torch.float64).mean(), RIGHT),
        ("loss_factors", lambda tokens: [2.0 for _ in tokens[1:]], "For 2 processes it returns 1 numbers"),
        ("loss_factors", lambda tokens: [2 * n / sum(tokens) + 1 for n in tokens], "the factors are [1.5, 0.5]"),
        ("ring", lambda *case: torch.tensor(ring()(*case), dtype=torch.float64).unbind(), RIGHT),
        ("ring", ring(lambda s, n: s / 3), "4 processes with 1200 bytes send 1800 bytes each, and it says 400"),
        ("ring", ring(seconds=lambda sent, s, n, speed: 7), "1200 bytes and 50 bytes a second it takes 36 seconds"),
        ("rows_of", lambda k, n, p: tuple(scale_out._chunk(k, n, p)) if k * -(-n // p) < n else (0, 0), RIGHT),
        ("rows_of", lambda k, n, p: (0, n), "Process 0 of 8 rows in 4 processes holds (0, 2), and it says (0, 8)"),
        ("rows_of", lambda k, n, p: list(range(k, n)), "return the first row and the row after the last"),
    ],
    own_data: [
        ("smallest_max_length", lambda *case: np.int64(own_data.smallest_max_length.right(*case)), RIGHT),
        ("smallest_max_length", lambda p, c, share: 400, "of 10 rows are whole, but"),
        ("smallest_max_length", lambda p, c, share: round(share * len(p)), "must be whole, and at 7 tokens 0 are"),
        ("side", own_data._side(lambda key: zlib.crc32(key.encode()) / 2**32), RIGHT),
        ("side", lambda key, share: "test" if random.Random(key).random() < share else "train", RIGHT),
        ("side", lambda key, share: "test" if own_data._even(key) < 0.2 else "train", "test with test_share=0.5"),
        ("side", own_data._side(lambda key: ord(key[-1]) % 10 / 10), "spread evenly from 0 to 1, and finely"),
        ("side", lambda key, share: own_data._even(key) < share, '; return "test" or'),
        ("paired_interval", normal_interval, RIGHT),
        ("paired_interval", loop_interval, RIGHT),
        ("paired_interval", lambda b, a, n, s: own_data._interval()(b, a, n, None), "Asked twice with the same seed"),
        ("paired_interval", lambda b, a, n, s: (0.0, 1.1), "The interval is about 0.125 to 0.230, and it says 0.000"),
        ("paired_interval", lambda b, a, n, s: (math.nan, 1.0), "return two numbers"),
    ],
}  # fmt: skip
ROWS = [(module, *row) for module, rows in ANSWERS.items() for row in rows]


@pytest.mark.parametrize(
    ("module", "name", "function", "hint"), ROWS, ids=[f"{name}-{i}" for i, (_, name, _, _) in enumerate(ROWS)]
)
def test_another_answer(module, name, function, hint, capsys):
    line = said(capsys, getattr(module, name), lambda *case: function(*case))
    assert (hint in line and not line.startswith("correct")) if hint else line.startswith("correct. "), line


@pytest.mark.parametrize(("seed", "patience"), itertools.product(range(4), (1, 2, 3)))
def test_the_solution_stops_where_transformers_stops(patience, seed, tmp_path):
    """The library's own callback, fed with the same losses; it sees the best of the evaluations before."""
    losses = np.random.default_rng(seed).integers(0, 6, 12).astype(float).tolist()
    arguments = TrainingArguments(str(tmp_path), metric_for_best_model="loss", greater_is_better=False, use_cpu=True)
    callback, state, control = EarlyStoppingCallback(patience), TrainerState(), TrainerControl()
    best = 0
    for number, loss in enumerate(losses, start=1):
        callback.on_evaluate(arguments, state, control, {"eval_loss": loss})
        if state.best_metric is None or loss < state.best_metric:
            state.best_metric, best = loss, number
        if control.should_training_stop:
            break
    assert exercise_functions("05_trainer")[1]["early_stopping"](losses, patience) == (number, best)


def test_the_length_is_the_one_that_encode_needs():
    """The solution against the library: one token less, and more rows than the share allows are cut."""
    from helpers.data import encode, load_commands
    from helpers.models import load_tokenizer

    tokenizer, rows = load_tokenizer("tiny"), load_commands("validation")
    prompts = [len(ids) for ids in tokenizer(rows["prompt"][:]).input_ids]
    completions = [len(ids) for ids in tokenizer(rows["completion"][:], add_special_tokens=False).input_ids]
    limit = exercise_functions("12_your_own_data")[1]["smallest_max_length"](prompts, completions, 0.9)
    for max_length, enough in ((limit, True), (limit - 1, False)):
        whole = sum(row["labels"][-1] == tokenizer.eos_token_id for row in encode(rows, tokenizer, max_length))
        assert (whole >= 0.9 * len(rows)) == enough


@pytest.mark.parametrize(("processes", "pieces"), [(1, 0), (2, 2), (4, 6), (64, 126)])
def test_the_ring_is_simulated_to_its_end(processes, pieces):
    assert scale_out._rounds_of_the_ring(processes) == pieces
