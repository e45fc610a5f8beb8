"""The exercises of notebook 12_your_own_data: a right answer, and the likely wrong ones, each with its hint."""

from __future__ import annotations

import builtins
import functools
import hashlib
import itertools
import math
import random
from typing import Any
from unittest.mock import patch

from helpers.checks.base import Answer, Exercise, Hint, same

import numpy as np


def _at(lengths: list[int], share: float) -> float:
    return sorted(lengths)[max(math.ceil(share * len(lengths) - 1e-9), 1) - 1]


def _sums(p: list[int], c: list[int], eos: int = 1) -> list[int]:
    return [a + b + eos for a, b in zip(p, c, strict=True)]


def _length_hint(p: list[int], c: list[int], share: float, found: float, right: float) -> str:
    kept, needed = sum(length <= found for length in _sums(p, c)), math.ceil(share * len(p) - 1e-9)
    if kept < needed:
        return f"With share={share} and {len(p)} rows, {needed} must be whole, and at {found:g} tokens {kept} are."
    return f"At {found:g} tokens {kept} of {len(p)} rows are whole, but {right:g} tokens are enough for share={share}."


PROMPTS = [10, 40, 25, 31, 18, 52, 77, 23, 36, 300]
COMPLETIONS = [30, 7, 12, 21, 9, 14, 11, 45, 8, 20]  # the order of the sums is not that of the prompts
smallest_max_length = Exercise(
    right=lambda prompt_tokens, completion_tokens, share: float(_at(_sums(prompt_tokens, completion_tokens), share)),
    cases=[(PROMPTS[:n], COMPLETIONS[:n], share) for n, share in ((10, 0.7), (7, 0.6), (8, 0.5), (10, 1.0))],
    mistakes={
        "It is one too small: the EOS takes a token too, and a row that loses it teaches not to stop.":
            lambda p, c, share: _at(_sums(p, c, eos=0), share),
        "It looks at the prompts alone: the completion and the EOS have to fit too.": lambda p, c, share: _at(p, share),
        "It looks at the completions alone: the prompt stands in front of them.": lambda p, c, share: _at(c, share),
        "It adds a length of the prompts to one of the completions, and they may be of different rows: add in each row "
        "first.": lambda p, c, share: _at(p, share) + _at(c, share) + 1,
        "It adds the longest prompt and the longest completion of two rows.": lambda p, c, share: max(p) + max(c) + 1,
        "It keeps every row: with a share below 1, the longest rows may be cut.": lambda p, c, share: max(_sums(p, c)),
        "It keeps 1 - share of the rows: count from the shortest.": [
            lambda p, c, share: _at(_sums(p, c), 1 - share),
            lambda p, c, share: sorted(_sums(p, c))[math.ceil((1 - share) * len(p)) - 1]],
        "It takes a share of the mean length: sort the lengths, and count rows.":
            lambda p, c, share: share * sum(_sums(p, c)) / len(p),
        "It takes a share of the longest length: sort the lengths, and count rows.":
            lambda p, c, share: share * max(_sums(p, c)),
    },
    returns="a number of tokens",
    otherwise=_length_hint,
    learned="No row more than the share allows loses a token of its answer, or the EOS that ends it.",
)  # fmt: skip


class _HashDiffersError(Exception):
    pass


def _hash_differs(_: object) -> int:
    raise _HashDiffersError


HASH = (
    "Python's hash() of a string differs from one process to the next: take one that is defined, such as "
    "hashlib.sha256(key.encode())."
)
ORDER = (
    "Asked again in another order, it puts keys on the other side: it counts calls, or draws at random. The side has "
    "to follow from the key alone."
)
ONE_SIDE = "Every key is on the same side: make a number from the key, and compare it with the share."
KEYS = [f"mail number {number}" for number in range(2000)]


def _test_share(answer: Answer, test_share: float) -> float:
    """Return how many of 2,000 keys go to test."""
    try:
        with patch.object(builtins, "hash", _hash_differs):
            first = {key: answer(key, test_share) for key in KEYS}
            again = {key: answer(key, test_share) for key in reversed(KEYS)}
    except _HashDiffersError:
        raise Hint(HASH) from None
    if odd := [value for value in first.values() if not isinstance(value, str) or value not in ("train", "test")]:
        raise Hint(f'It returns {odd[0]!r}; return "test" or "train".')
    if first != again:
        raise Hint(ORDER)
    if len(set(first.values())) == 1:
        raise Hint(ONE_SIDE)
    return sum(value == "test" for value in first.values()) / len(KEYS)


def _side(number: Answer, swapped: bool = False) -> Answer:
    """Return an answer that compares a number, from the key, with the share."""
    return lambda key, test_share: "test" if (number(key) < test_share) != swapped else "train"


def _even(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


_calls = itertools.count()
side = Exercise(
    right=_side(_even),
    cases=[(0.2,), (0.5,), (0.05,)],
    run=_test_share,
    agrees=functools.partial(same, atol=0.03),
    mistakes={
        HASH: _side(lambda key: hash(key) % 1000 / 1000),
        ORDER: [_side(lambda key: random.random()), _side(lambda key: next(_calls) % 100 / 100)],
        ONE_SIDE: [_side(lambda key: 0), _side(lambda key: 1)],
        "The sides are swapped: test_share of the keys go to test.": [
            _side(_even, swapped=True), _side(lambda key: 1 - _even(key), swapped=True)],
    },
    otherwise=lambda test_share, found, right: f"{found:.0%} of 2,000 keys go to test with test_share={test_share}. "
    "The number made from a key should be spread evenly from 0 to 1, and finely.",
    learned="A row keeps its side when the file grows, is sorted, or is read by another process.",
)  # fmt: skip


def _interval(
    value: Answer = lambda before, after, rows, others: (after - before)[rows], low: float = 0.025, high: float = 0.975,
    end: Answer = lambda ends: ends,
) -> Answer:  # fmt: skip
    """Return an answer that takes quantiles of the means, over draws, of the values in the rows drawn."""

    def function(before: list[bool], after: list[bool], draws: int, seed: int) -> list[float]:
        rows, others = np.random.default_rng(seed).integers(len(before), size=(2, draws, len(before)))
        values = value(np.array(before, dtype=float), np.array(after, dtype=float), rows, others)
        return list(map(float, end(np.quantile(values.mean(axis=1), [low, high]))))

    return function


def _same_seed(answer: Answer) -> None:
    few = [[tuple(map(float, answer([True, False] * 20, [True] * 40, 5, seed))) for seed in range(4)] for _ in range(2)]
    if few[0] != few[1]:
        raise Hint("Asked twice with the same seed it answers differently: draw from np.random.default_rng(seed).")


def _interval_hint(*case: Any) -> str:
    found, right = case[-2:]
    if len(found) != 2 or not np.isfinite(np.array(found, dtype=float)).all():
        return f"It returns {found}; return two numbers, low and high."
    return f"The interval is about {right[0]:.3f} to {right[1]:.3f}, and it says {found[0]:.3f} to {found[1]:.3f}."


paired_interval = Exercise(
    right=_interval(),
    cases=[([True] * 140 + [False] * 60, [True] * 175 + [False] * 25, 4000, 0)],
    agrees=functools.partial(same, rtol=0, atol=0.0075),  # the same interval from other draws
    mistakes={
        "The ends are swapped: return low, then high.": _interval(end=lambda ends: ends[::-1]),
        "The sign is turned: the difference is after minus before.": _interval(end=lambda ends: -ends[::-1]),
        "It returns percent; return shares from -1 to 1.": _interval(end=lambda ends: 100 * ends),
        "It draws the rows of the two lists apart, and the interval gets too wide: draw rows, and take both answers of "
        "each.": _interval(lambda before, after, rows, others: after[others] - before[rows]),
        "It is the 90 % interval: 2.5 % of the draws are below, and 2.5 % above.": _interval(low=0.05, high=0.95),
        "It is one standard deviation to each side, about 68 %: take the middle 95 % of the draws.":
            _interval(low=0.16, high=0.84),
        "It is the interval of `after` alone: subtract `before` in each draw.":
            _interval(lambda before, after, rows, others: after[rows]),
        "It is the interval of `before` alone: take the difference in each draw.":
            _interval(lambda before, after, rows, others: before[rows]),
        "It has no width: draw with replacement, as many rows as there are.":
            _interval(lambda before, after, rows, others: (after - before)[None]),
        "These are quantiles of the rows: take those of the mean of each draw.":
            _interval(lambda before, after, rows, others: (after - before)[:, None]),
    },
    returns="two numbers, low and high",
    otherwise=_interval_hint,
    further=[_same_seed],
    learned="The rows are drawn, each with both of its answers: what makes a row hard is in both.",
)  # fmt: skip
