"""The checks of notebook 12: the solution passes, the stub does not, and each mistake gets its hint."""

import hashlib
import itertools
import math
import random
import zlib
from functools import partial

from helpers.checks import own_data as checks

import numpy as np
import pytest
import torch
from exercises import exercise_functions, exercise_tests, said

STUBS, SOLUTIONS = exercise_functions("12_your_own_data")
_said = partial(said, checks)


def _nothing(*arguments):
    return None


# smallest_max_length(prompt_tokens, completion_tokens, share)


def _sums(p, c, eos=1):
    return sorted(a + b + eos for a, b in zip(p, c, strict=True))


def _at(lengths, share):
    return sorted(lengths)[math.ceil(share * len(lengths)) - 1]


def _sorts_in_place(p, c, share):
    right = SOLUTIONS["smallest_max_length"](p, c, share)
    p.sort()
    return right


LENGTHS = [
    (lambda p, c, share: _at(_sums(p, c, eos=0), share), "the EOS takes a token too"),
    (lambda p, c, share: _at(p, share), "looks at the prompts alone"),
    (lambda p, c, share: _at(c, share), "looks at the completions alone"),
    (lambda p, c, share: _at(p, share) + _at(c, share) + 1, "add in each row first"),
    (lambda p, c, share: max(p) + max(c) + 1, "the longest prompt and the longest completion of two rows"),
    (lambda p, c, share: _sums(p, c)[-1], "It keeps every row"),
    (lambda p, c, share: _at(_sums(p, c), 1 - share), "It keeps 1 - share of the rows"),
    (lambda p, c, share: share * float(np.mean(_sums(p, c))), "a share of the mean length"),
    (lambda p, c, share: share * _sums(p, c)[-1], "a share of the longest length"),
    (lambda p, c, share: _sums(p, c)[min(int(share * len(p)), len(p) - 1)], "of 10 rows are whole, but"),
    (lambda p, c, share: _sums(p, c)[max(int(share * len(p)) - 1, 0)], "must be whole, and at"),
    (lambda p, c, share: float(np.quantile(_sums(p, c), share)), "of 10 rows are whole, but"),
    (lambda p, c, share: round(share * len(p)), "must be whole, and at 7 tokens 0 are"),
    (_sorts_in_place, "sort a copy"),
    (_nothing, "It returns NoneType; return a number of tokens"),
    (lambda p, c, share: _sums(p, c), "It returns list; return a number of tokens"),
    (lambda p, c, share: True, "It returns bool; return a number of tokens"),
    (lambda p, c, share: _sums(p, c)[int(share * len(p)) + 5], "your function raised IndexError"),
]


# side(key, test_share)


def _number(key):
    return int.from_bytes(hashlib.md5(key.encode()).digest()[:8], "big") / 2**64


_calls = itertools.count()
SIDES = [
    (lambda key, share: "test" if hash(key) % 1000 < 1000 * share else "train", "hash() of a string differs"),
    (lambda key, share: "test" if random.random() < share else "train", "draws at random"),
    (lambda key, share: "test" if next(_calls) % 100 < 100 * share else "train", "it counts calls"),
    (lambda key, share: "test" if random.Random(0).random() < share else "train", "Every key is on the same side"),
    (lambda key, share: "test" if len(key) % 100 < 100 * share else "train", "Every key is on the same side"),
    (lambda key, share: "train" if _number(key) < share else "test", "the sides are swapped"),
    (lambda key, share: "test" if _number(key) < 0.2 else "train", "go to test with test_share=0.5"),
    (
        lambda key, share: "test" if int(10 * _number(key)) < 10 * share else "train",
        "spread evenly from 0 to 1, and fin",
    ),
    (lambda key, share: "test" if ord(key[-1]) % 10 < 10 * share else "train", "spread evenly from 0 to 1, and finely"),
    (lambda key, share: _number(key) < share, '; return "test" or'),
    (lambda key, share: "validation", "It returns 'validation'"),
    (_nothing, "It returns None"),
    (lambda key, share: torch.tensor(1.0), "It returns tensor(1.)"),
    (lambda key, share: key / share, "your function raised TypeError"),
]


# paired_interval(before, after, draws, seed)


def _draw(before, draws, seed):
    return np.random.default_rng(seed).integers(len(before), size=(draws, len(before)))


def _change(before, after):
    return np.array(after, dtype=float) - np.array(before, dtype=float)


def _ends(values, low=0.025, high=0.975):
    return tuple(float(value) for value in np.quantile(values, [low, high]))


def _paired(before, after, draws, seed, low=0.025, high=0.975):
    return _ends(_change(before, after)[_draw(before, draws, seed)].mean(axis=1), low, high)


def _apart(before, after, draws, seed):
    rows, others = _draw(before, draws, seed), _draw(before, draws, seed + 1)
    return _ends(np.array(after)[others].mean(axis=1) - np.array(before)[rows].mean(axis=1))


def _permutes(before, after, draws, seed):
    rng, change = np.random.default_rng(seed), _change(before, after)
    return _ends([rng.permutation(change).mean() for _ in range(draws)])


def _one_error(before, after, draws, seed):
    change = _change(before, after)
    error = change.std() / len(change) ** 0.5
    return change.mean() - error, change.mean() + error


def _without_seed(before, after, draws, seed):
    return _paired(before, after, draws, None)


def _clears(before, after, draws, seed):
    result = _paired(before, after, draws, seed)
    before.clear()
    return result


INTERVALS = [
    (_apart, "draws the rows of the two lists apart"),
    (lambda b, a, n, s: _paired(b, a, n, s)[::-1], "The ends are swapped"),
    (lambda b, a, n, s: _paired(a, b, n, s), "The sign is turned"),
    (lambda b, a, n, s: tuple(100 * end for end in _paired(b, a, n, s)), "It returns percent"),
    (lambda b, a, n, s: _paired(b, a, n, s, 0.05, 0.95), "It is the 90 % interval"),
    (_one_error, "one standard deviation to each side"),
    (lambda b, a, n, s: _ends(np.array(a)[_draw(b, n, s)].mean(axis=1)), "the interval of `after` alone"),
    (lambda b, a, n, s: _ends(np.array(b)[_draw(b, n, s)].mean(axis=1)), "the interval of `before` alone"),
    (_permutes, "It has no width: draw with replacement"),
    (lambda b, a, n, s: _ends(_change(b, a)), "quantiles of the rows"),
    (lambda b, a, n, s: _ends(_change(b, a)[_draw(b[:50], n, s)].mean(axis=1)), "The interval is about 0.1"),
    (_without_seed, "Asked twice with the same seed"),
    (_clears, "It changes the lists"),
    (_nothing, "It returns NoneType; return two numbers"),
    (lambda b, a, n, s: 0.175, "It returns float; return two numbers"),
    (lambda b, a, n, s: (1.0, 2.0, 3.0), "return two numbers"),
    (lambda b, a, n, s: (math.nan, 1.0), "not a number"),
    (lambda b, a, n, s: (None, 1.0), "your function raised TypeError"),
]
WRONG = [
    (name, function, hint)
    for name, answers in (("smallest_max_length", LENGTHS), ("side", SIDES), ("paired_interval", INTERVALS))
    for function, hint in answers
]


test_the_solution_passes_and_the_stub_does_not, test_a_mistake_gets_its_hint = exercise_tests(
    checks, STUBS, SOLUTIONS, WRONG
)


def _crc(key, share):
    return "test" if zlib.crc32(key.encode()) / 2**32 < share else "train"


def _seeded_by_the_key(key, share):
    return "test" if random.Random(key).random() < share else "train"


def _normal(before, after, draws, seed):
    change = _change(before, after)
    error = 1.96 * change.std() / len(change) ** 0.5
    return change.mean() - error, change.mean() + error


def _loop(before, after, draws, seed):
    rng, means = random.Random(seed), []
    for _ in range(draws):
        rows = rng.choices(range(len(before)), k=len(before))
        means.append(sum(after[i] - before[i] for i in rows) / len(rows))
    means.sort()
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("side", _crc),
        ("side", _seeded_by_the_key),
        ("paired_interval", _normal),
        ("paired_interval", _loop),
        ("paired_interval", lambda b, a, n, s: np.array(_paired(b, a, n, s + 1))),
        ("smallest_max_length", lambda p, c, share: np.int64(_at(_sums(p, c), share))),
        ("smallest_max_length", lambda p, c, share: int(np.quantile(_sums(p, c), share, method="inverted_cdf"))),
    ],
)
def test_other_right_answers_pass(capsys, name, function):
    assert "correct" in _said(capsys, name, function)


def test_the_length_is_the_one_that_encode_needs(tmp_path):
    """The solution against the library: one token less, and more rows than the share allows are cut."""
    from helpers.data import encode, load_commands
    from helpers.models import load_tokenizer

    tokenizer, rows = load_tokenizer("tiny"), load_commands("validation")
    prompts = [len(ids) for ids in tokenizer(rows["prompt"][:]).input_ids]
    completions = [len(ids) for ids in tokenizer(rows["completion"][:], add_special_tokens=False).input_ids]
    limit = SOLUTIONS["smallest_max_length"](prompts, completions, 0.9)
    for max_length, enough in ((limit, True), (limit - 1, False)):
        whole = sum(row["labels"][-1] == tokenizer.eos_token_id for row in encode(rows, tokenizer, max_length))
        assert (whole >= 0.9 * len(rows)) == enough
