"""The exercise checks: every solution passes, no stub does, and each mistake gets its own hint."""

import copy
import importlib
import math
import re

from helpers.checks import base

import nbformat
import numpy as np
import pytest
import torch
from exercises import NOTEBOOKS, exercise_functions
from torch.nn import functional as F


def _exercises():
    """Return (notebook, checks, name) for every exercise, in the notebooks' order."""
    found = []
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        if imported := re.search(r"from helpers\.checks import (\w+) as checks", "\n".join(c.source for c in cells)):
            checks = importlib.import_module(f"helpers.checks.{imported[1]}")
            names = [name for name, value in vars(checks).items() if isinstance(value, base.Exercise)]
            found += [(path.stem, checks, name) for name in names]
    return found


EXERCISES = _exercises()
MISTAKES = [
    (checks, name, hint, wrong)
    for _, checks, name in EXERCISES
    for hint, answers in getattr(checks, name).mistakes.items()
    for wrong in ([answers] if callable(answers) else answers)
]
each_exercise = pytest.mark.parametrize(
    ("notebook", "checks", "name"), EXERCISES, ids=[f"{notebook[:2]}-{name}" for notebook, _, name in EXERCISES]
)


def said(capsys, exercise, function):
    """Return what the check prints about a function: one line, and nothing else is changed by it."""
    name, state, cases = function.__name__, torch.get_rng_state(), copy.deepcopy(exercise.cases)
    exercise(function)
    assert torch.equal(torch.get_rng_state(), state), "the check leaves other random numbers behind"
    assert base.same(list(exercise.cases), list(cases)), "a case has been changed"
    printed = capsys.readouterr().out
    assert printed.startswith(f"{name}: "), printed
    assert printed.count("\n") == 1, printed
    return printed.removeprefix(f"{name}: ").removesuffix("\n")


def test_the_exercises_are_the_notebooks():
    for notebook in {notebook for notebook, _, _ in EXERCISES}:
        assert list(exercise_functions(notebook)[0]) == [name for other, _, name in EXERCISES if other == notebook]


@each_exercise
def test_solution_stub_and_error(notebook, checks, name, capsys):
    def error(*arguments):
        raise KeyError("x")

    exercise = getattr(checks, name)
    stubs, solutions = exercise_functions(notebook)
    assert said(capsys, exercise, solutions[name]) == f"correct. {exercise.learned}"
    assert said(capsys, exercise, stubs[name]).startswith("not written yet. ")
    assert said(capsys, exercise, error) == "your function raised KeyError: 'x'"
    assert exercise.mistakes


@pytest.mark.parametrize(
    ("checks", "name", "hint", "wrong"), MISTAKES, ids=[f"{name}-{i}" for i, (_, name, _, _) in enumerate(MISTAKES)]
)
def test_a_mistake_gets_its_own_hint(checks, name, hint, wrong, capsys):
    assert said(capsys, getattr(checks, name), lambda *arguments: wrong(*arguments)) == f"not yet. {hint}"


# What base.py says of any exercise: on scaling a matrix, on a pair of numbers, and on a list of whole ones.

SCALE = base.Exercise(
    right=lambda x, factor: factor * x,
    cases=[(torch.arange(6.0).reshape(2, 3), 2.0), (torch.ones(3), 0.5)],
    mistakes={"It divides.": lambda x, factor: x / factor, "Twice.": [lambda x, f: x * f * f, lambda x, f: 2 * f * x]},
    learned="Yes.",
    returns="a scaled tensor",
    raises="Multiply by a number.",
)
PAIR = base.Exercise(
    right=lambda n: (n + 1, n / 2),
    cases=[(3,), (5,)],
    mistakes={
        "One too few.": lambda n: (n, n / 2),
        "Not halved.": lambda n: (n + 1, n),
        "Swapped.": lambda n: (n / 2, n + 1),
        "Zero.": lambda n: 1 / 0,
    },
    learned="Yes.",
    returns="two numbers",
)
LIST = base.Exercise(
    right=lambda n: [n, 2 * n] if n else None, cases=[(3,), (0,)], mistakes={}, learned="Yes.", returns="a list"
)


@pytest.mark.parametrize(
    ("exercise", "function", "line"),
    [
        (SCALE, lambda x, factor: (factor * x).double(), "correct. Yes."),
        (SCALE, lambda x, factor: x / factor, "not yet. It divides."),
        (SCALE, lambda x, factor: 2 * factor * x, "not yet. Twice."),
        (SCALE, lambda x, factor: x * 3, "not yet. For x=tensor(.*), factor=2.0 it is tensor(.*), not tensor(.*)."),
        (SCALE, lambda x, factor: x.mul_(factor), "not yet. It changes x in place: work on a copy."),
        (SCALE, lambda x, factor: None, "not yet. It returns None; return a scaled tensor."),
        (SCALE, lambda x, factor: (factor * x).numpy(), "not yet. It returns ndarray; return a scaled tensor."),
        (
            SCALE,
            lambda x, factor: (factor * x)[0],
            r"not yet. It returns the shape \(3,\), expected \(2, 3\); return a",
        ),
        (
            SCALE,
            lambda x, factor: (factor * x).int(),
            "not yet. It returns torch.int32, expected torch.float32; return",
        ),
        (SCALE, lambda x, factor: x * float("nan"), "not yet. Its result holds inf or NaN."),
        (SCALE, lambda x, factor: x @ torch.ones(7), "not yet. The shapes do not fit .*. Multiply by a number."),
        (SCALE, lambda x: x, "your function raised TypeError: "),
        (PAIR, lambda n: [n + 1, n / 2], "correct. Yes."),
        (PAIR, lambda n: (torch.tensor(n + 1), np.float32(n / 2)), "correct. Yes."),
        (PAIR, lambda n: (n, n), "not yet. One too few."),
        (PAIR, lambda n: (n + 1, n), "not yet. Not halved."),
        (PAIR, lambda n: (n / 2, n + 1), "not yet. Swapped."),
        (PAIR, lambda n: {}[n] if n == 5 else (n + 1, n / 2), "your function raised KeyError: 5"),
        (PAIR, lambda n: (n + 1) // (n - n), "not yet. Zero."),
        (PAIR, lambda n: n + 1, "not yet. It returns int; return two numbers."),
        (PAIR, lambda n: (n + 1, n / 2, n), "not yet. It returns 3 values; return two numbers."),
        (PAIR, lambda n: (n + 1.0, n / 2), "not yet. It returns float; return two numbers."),
        (PAIR, lambda n: (True, n / 2), "not yet. It returns bool; return two numbers."),
        (LIST, lambda n: np.array([n, 2 * n]) if n else None, "correct. Yes."),
        (LIST, lambda n: (n, 2 * n) if n else None, "correct. Yes."),
        (LIST, lambda n: [n] if n else None, r"not yet. For n=3 it is \[3, 6\], not \[3\]."),
        (LIST, lambda n: None, r"not yet. For n=3 it is \[3, 6\], not None."),
        (LIST, lambda n: [n, 2 * n], r"not yet. For n=0 it is None, not \[0, 0\]."),
        (LIST, lambda n: {n, 2 * n} if n else None, "not yet. It returns set; return a list."),
    ],
)
def test_what_is_said_of_any_exercise(exercise, function, line, capsys):
    assert re.match(line, found := said(capsys, exercise, function), re.DOTALL), found


# Answers that are not among the mistakes: right ones by another way (None), and wrong ones with a part of their hint.


def _svd(w):
    return torch.linalg.svd(w, full_matrices=False)


def _packed_in_a_loop(lengths):
    positions, mask, start = [], torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool), 0
    for length in lengths:
        positions += range(length)
        mask[start : start + length, start : start + length] = torch.ones(length, length).tril().bool()
        start += length
    return torch.tensor(positions), mask


def _by_mean_loss(scale, starts):
    """Return a train_epoch by the model's own mean loss: scaled, and with windows that start where `starts` says."""

    def train_epoch(model, micro_batches, optimizer, steps):
        for start in starts(len(micro_batches), steps):
            window = micro_batches[start : start + steps]
            counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in window]
            optimizer.zero_grad()
            for batch, count in zip(window, counts, strict=True):
                (scale * model(**batch).loss * count / sum(counts)).backward()
            optimizer.step()
        return 3

    return train_epoch


def _int8(rounded=torch.round, zero=1.0, absmax=lambda absmax: absmax):
    def quantize_int8(x, block_size):
        blocks = x.view(-1, block_size)
        largest = blocks.abs().amax(dim=1)
        codes = rounded(127 * blocks / torch.where(largest == 0, zero, largest)[:, None])
        return codes.to(torch.int8), absmax(largest)

    return quantize_int8


OTHERS = [
    ("lora", "best_rank_r", lambda w, r: (p := torch.linalg.eigh(w @ w.T)[1][:, -r:]) @ p.T @ w, None),
    ("lora", "best_rank_r", lambda w, r: (_svd(w)[0][:, : r + 1] * _svd(w)[1][: r + 1]) @ _svd(w)[2][: r + 1],
     "For r=2 the result has rank 3 and error"),
    ("lora", "lora_forward", lambda x, W, A, B, alpha: x @ (W + alpha / len(A) * B @ A).T, None),
    ("lora", "lora_forward", lambda x, W, A, B, alpha: x @ W.T - alpha / len(A) * (x @ A.T @ B.T),
     "Compute the two terms one by one"),
    ("lora", "lora_forward", lambda x, W, A, B, alpha: x @ W.T + x @ A @ B, "x meets A first"),
    ("lora", "parameter_count", lambda model, names, r: 184, "It returns 184 for two blocks"),
    ("lora", "merge", lambda W, A, B, alpha: (W.double() + alpha * B.double() @ A.double() / len(A)).to(W.dtype), None),
    ("lora", "merge", lambda W, A, B, alpha: W + alpha / len(A) * A @ B, "A @ B has not"),
    ("lora", "merge", lambda W, A, B, alpha: W + alpha / len(A) * B @ A, "in bfloat16 it returns float32: convert"),
    ("lora", "merge", lambda W, A, B, alpha: W + (alpha / len(A) * B @ A).to(W.dtype), "entries are off by a rounding"),
    ("memory_speed", "bytes_without_activations", lambda f, t, bits: int(f * bits / 8) + 16 * t, None),
    ("memory_speed", "bytes_without_activations", lambda f, t, bits: 7, "ones it is 2,480,000, and it says 7"),
    ("memory_speed", "lora_step_flops", lambda f, a, t, twice: 3, "it is 1,236,000,000, and it says 3"),
    ("memory_speed", "packed", _packed_in_a_loop, None),
    ("memory_speed", "packed", lambda n: (torch.zeros(sum(n)).long(), _packed_in_a_loop(n)[1]),
     "For [3, 1, 4] they are [0, 1, 2, 0, 0, 1, 2, 3], not"),
    ("memory_speed", "packed", lambda n: (_packed_in_a_loop(n)[0], torch.eye(sum(n)).bool()),
     "For [3, 1, 4], token 1 may see 0."),
    ("memory_speed", "columns_to_keep", lambda labels: torch.where(labels[:, 1:] != -100)[1].unique(), None),
    ("memory_speed", "columns_to_keep", lambda labels: torch.arange(6), "need [2, 3, 4, 8, 10, 11]"),
    ("gradients", "lora_gradients", lambda G, A, B, s: (s * B.T @ G + 1, s * G @ A.T), "of A is not autograd's"),
    ("gradients", "moved", lambda before, model: {"tiny.weight": True},
     "the frozen ones too: look at balanced.weight, frozen.weight, still.weight"),
    ("gradients", "moved", lambda before, model: {name: name != "still.weight" for name in before}, None),
    ("gradients", "moved", lambda before, model: dict.fromkeys(before, True), "moved that did not"),
    ("accumulation", "number_of_updates", lambda *case: 7, "there are 3 updates, and it says 7"),
    ("accumulation", "window_loss", lambda x, y: x[0].sum() * 0 + 9, "On our window it should be"),
    ("accumulation", "train_epoch", _by_mean_loss(1, range_of := lambda n, steps: range(0, n, steps)), None),
    ("accumulation", "train_epoch", _by_mean_loss(2.5, range_of), "Update 1 of 6 does not get the gradient"),
    ("accumulation", "train_epoch", _by_mean_loss(1, lambda n, steps: (0, 0)), "are 6 updates, and it makes 4"),
    ("accumulation", "train_epoch", lambda *arguments: _by_mean_loss(1, range_of)(*arguments) and None,
     "Return their number, which is 3; it returns None"),
    ("accumulation", "accelerate_loss", lambda total, n, steps, p: total / (n - 1) * steps * p, "is 1.20, not 1.23"),
    ("quantization", "quantize_int8", _int8(rounded=lambda x: torch.floor(x + 0.5)), None),
    ("quantization", "quantize_int8", _int8(absmax=lambda a: a + 1), "The absmax of the first block should be"),
    ("quantization", "quantize_int8", _int8(absmax=lambda a: torch.where(a == 0, 1.0, a)), "is 0, and it says 1"),
    ("quantization", "quantize_int8", _int8(rounded=lambda x: torch.where(x == 0, 5, x.round())),
     "The codes of a block of zeros are 0, and the first is 5"),
    ("quantization", "quantize_int8", _int8(zero=0.0), "0 / 0 is NaN"),
    ("quantization", "quantize_int8", _int8(zero=0.0, rounded=lambda x: x.nan_to_num().round()), "0 / 0 is NaN"),
    ("quantization", "quantize_int8", _int8(rounded=lambda x: x.round() - (x == 127).int()), "are off: 4 of 48."),
    ("quantization", "nearest_code", lambda x, levels: (x[..., None] - levels).abs().argmin(-1).int(), None),
    ("quantization", "nearest_code", lambda x, levels: torch.zeros_like(x).long(), "is nearest to level 1 of [-1.0,"),
    ("quantization", "bits_double_quantized", lambda b, n: (4 * b * n + 8 * n + 32) / (b * n), None),
    ("quantization", "bits_double_quantized", lambda b, n: 5.0, "it is 4.127, and it says 5.000"),
    ("quantization", "pack", lambda codes: codes[::2] * 16 + F.pad(codes[1::2], (0, len(codes) % 2), value=7), None),
    ("quantization", "pack", lambda codes: codes[::2] * 16 + F.pad(codes[1::2], (0, len(codes) % 2), value=15),
     "The codes [3, 7] make the byte 55, and it says 63"),
    ("quantization", "pack", lambda codes: codes, "10 codes make 5 bytes, and its shape is (10,)"),
    ("qlora", "training_bytes", lambda n, m, k: torch.tensor(n * 4.127 / 8 + m * 4 + k * 10), None),
    ("qlora", "training_bytes", lambda n, m, k: 4 * n + 4 * m + 10 * k, "be 191 million bytes, and it is 560"),
    ("qlora", "training_bytes", lambda n, m, k: "191", "It returns str; return one number"),
    ("qlora", "smallest_rank", lambda shapes, n: 44, "4,096 elements it should be 22, and it is 44"),
    ("qlora", "first_bad_step", lambda log: next((e["step"] for e in log if not math.isfinite(e["loss"])), None),
     "asks every entry for 'loss'"),
    ("qlora", "first_bad_step", lambda log: log[0]["step"] + 3, "it should be 3, and it is 4"),
    ("qlora", "merge_error", lambda w, A, B, s, to_nf4: torch.tensor(9.0), "On our weight it should be"),
    ("qlora", "merge_error", lambda w, A, B, s, to_nf4: (to_nf4(w) - w), "It returns Tensor; return one number"),
    ("qlora", "merge_error", lambda w, A, B, s, to_nf4: w + A @ B, "your function raised RuntimeError"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("checks", "name", "function", "hint"), OTHERS, ids=[f"{name}-{i}" for i, (_, name, _, _) in enumerate(OTHERS)]
)
def test_another_answer(checks, name, function, hint, capsys):
    line = said(capsys, getattr(importlib.import_module(f"helpers.checks.{checks}"), name), function)
    assert (hint in line and not line.startswith("correct. ")) if hint else line.startswith("correct. "), line
