"""The checks of notebook 12_your_own_data."""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable
from unittest.mock import patch

from helpers.checks.base import Hint, check

import numpy as np


def smallest_max_length(answer: Callable[[list[int], list[int], float], int]) -> None:
    """Check `smallest_max_length(prompt_tokens, completion_tokens, share)`: a quantile of prompt + completion + EOS."""

    def test() -> None:
        prompts = [10, 40, 25, 31, 18, 52, 77, 23, 36, 300]
        completions = [30, 7, 12, 21, 9, 14, 11, 45, 8, 20]  # the order of the sums is not that of the prompts
        for count, share in ((10, 0.7), (7, 0.6), (8, 0.5), (10, 1.0)):
            given = prompts[:count], completions[:count]
            _length(answer(list(given[0]), list(given[1]), share), given, share)
        changed = (list(prompts), list(completions))
        answer(*changed, 0.5)
        if changed != (prompts, completions):
            raise Hint("It changes the lists that it is given: sort a copy.")

    check(answer, test, "No row more than the share allows loses a token of its answer, or the EOS that ends it.")


def _length(result: object, given: tuple[list[int], list[int]], share: float) -> None:
    if isinstance(result, bool) or not isinstance(result, int | float | np.number):
        raise Hint(f"It returns {type(result).__name__}; return a number of tokens.")
    prompts, completions = given
    whole = sorted(p + c + 1 for p, c in zip(prompts, completions, strict=True))
    count = len(whole)

    def at(share: float, lengths: list[int] = whole) -> int:
        return sorted(lengths)[max(math.ceil(share * count - 1e-9), 1) - 1]

    right = at(share)
    if result == right:
        return
    kept = sum(length <= result for length in whole)
    mistakes = [
        (right - 1, "It is one too small: the EOS takes a token too, and a row that loses it teaches not to stop."),
        (at(share, prompts), "It looks at the prompts alone: the completion and the EOS have to fit too."),
        (at(share, completions), "It looks at the completions alone: the prompt stands in front of them."),
        (
            at(share, prompts) + at(share, completions) + 1,
            "It adds a length of the prompts to one of the completions, and they may be of different rows: add in "
            "each row first.",
        ),
        (max(prompts) + max(completions) + 1, "It adds the longest prompt and the longest completion of two rows."),
        (max(whole), "It keeps every row: with a share below 1, the longest rows may be cut."),
        (at(1 - share), turned := "It keeps 1 - share of the rows: count from the shortest."),
        (whole[math.ceil((1 - share) * count) - 1], turned),
        (sum(whole) / count * share, "It takes a share of the mean length: sort the lengths, and count rows."),
        (max(whole) * share, "It takes a share of the longest length: sort the lengths, and count rows."),
    ]
    for wrong, hint in mistakes:
        if math.isclose(result, wrong):
            raise Hint(hint)
    needed = math.ceil(share * count - 1e-9)
    if kept < needed:
        raise Hint(f"With share={share} and {count} rows, {needed} must be whole, and at {result:g} tokens {kept} are.")
    raise Hint(
        f"At {result:g} tokens {kept} of {count} rows are whole, but {right} tokens are enough for share={share}."
    )


def side(answer: Callable[[str, float], str]) -> None:
    """Check `side(key, test_share)`: train or test, from the text alone, the same in every process."""

    def test() -> None:
        keys = [f"mail number {number}" for number in range(2000)]
        try:
            with patch.object(builtins, "hash", _hash_differs):
                first = {key: answer(key, 0.2) for key in keys}
                again = {key: answer(key, 0.2) for key in reversed(keys)}
        except _HashDiffersError:
            raise Hint(
                "Python's hash() of a string differs from one process to the next: take one that is defined, such as "
                "hashlib.sha256(key.encode())."
            ) from None
        odd = [value for value in first.values() if not isinstance(value, str) or value not in ("train", "test")]
        if odd:
            raise Hint(f'It returns {odd[0]!r}; return "test" or "train".')
        if first != again:
            raise Hint(
                "Asked again in another order, it puts keys on the other side: it counts calls, or draws at random. "
                "The side has to follow from the key alone."
            )
        for share in (0.2, 0.5, 0.05):
            found = sum(answer(key, share) == "test" for key in keys) / len(keys)
            if found in (0, 1):
                raise Hint("Every key is on the same side: make a number from the key, and compare it with the share.")
            if abs(found - (1 - share)) < 0.05 and share != 0.5:
                raise Hint(f"{found:.0%} go to test with test_share={share}: the sides are swapped.")
            if abs(found - share) > 0.05 or (share == 0.05 and found > 0.08):
                raise Hint(
                    f"{found:.0%} of 2,000 keys go to test with test_share={share}. The number made from a key should "
                    "be spread evenly from 0 to 1, and finely."
                )

    check(answer, test, "A row keeps its side when the file grows, is sorted, or is read by another process.")


class _HashDiffersError(Exception):
    pass


def _hash_differs(_: object) -> int:
    raise _HashDiffersError


def paired_interval(answer: Callable[[list[bool], list[bool], int, int], tuple[float, float]]) -> None:
    """Check `paired_interval(before, after, draws, seed)`: a 95 % percentile bootstrap over rows, in pairs."""

    def test() -> None:
        before = [True] * 140 + [False] * 60
        after = [True] * 175 + [False] * 25
        given = list(before), list(after)
        result = answer(*given, 4000, 0)
        if given != (before, after):
            raise Hint("It changes the lists that it is given.")
        if not isinstance(result, tuple | list | np.ndarray) or len(result) != 2:
            raise Hint(f"It returns {type(result).__name__}; return two numbers, low and high.")
        found = np.array([float(value) for value in result])
        if not np.isfinite(found).all():
            raise Hint("An end of the interval is not a number.")
        _interval(found, np.array(before, dtype=float), np.array(after, dtype=float))
        few = [[tuple(map(float, answer(before, after, 5, seed))) for seed in range(4)] for _ in range(2)]
        if few[0] != few[1]:
            raise Hint("Asked twice with the same seed it answers differently: draw from np.random.default_rng(seed).")

    check(answer, test, "The rows are drawn, each with both of its answers: what makes a row hard is in both.")


def _interval(found: np.ndarray, before: np.ndarray, after: np.ndarray) -> None:
    rng, rows = np.random.default_rng(0), len(before)
    rows_drawn, others = rng.integers(rows, size=(2, 8000, rows))
    paired = (after - before)[rows_drawn].mean(axis=1)
    apart = after[others].mean(axis=1) - before[rows_drawn].mean(axis=1)

    def ends(draws: np.ndarray, level: float = 0.95) -> np.ndarray:
        return np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])

    right = ends(paired)
    mistakes = [
        (right, ""),
        (right[::-1], "The ends are swapped: return low, then high."),
        (-right[::-1], "The sign is turned: the difference is after minus before."),
        (100 * right, "It returns percent; return shares from -1 to 1."),
        (
            ends(apart),
            "It draws the rows of the two lists apart, and the interval gets too wide: draw rows, and take both "
            "answers of each.",
        ),
        (ends(paired, 0.9), "It is the 90 % interval: 2.5 % of the draws are below, and 2.5 % above."),
        (
            ends(paired, 0.68),
            "It is one standard deviation to each side, about 68 %: take the middle 95 % of the draws.",
        ),
        (ends(after[rows_drawn].mean(axis=1)), "It is the interval of `after` alone: subtract `before` in each draw."),
        (
            ends(before[rows_drawn].mean(axis=1)),
            "It is the interval of `before` alone: take the difference in each draw.",
        ),
        (np.repeat(paired.mean(), 2), "It has no width: draw with replacement, as many rows as there are."),
        (
            np.quantile(after - before, [0.025, 0.975]),
            "These are quantiles of the rows: take those of the mean of each draw.",
        ),
    ]
    for wrong, hint in mistakes:
        if np.abs(found - wrong).max() < 0.0075 * (100 if np.abs(wrong).max() > 1.5 else 1):
            if hint:
                raise Hint(hint)
            return
    raise Hint(f"The interval is about {right[0]:.3f} to {right[1]:.3f}, and it says {found[0]:.3f} to {found[1]:.3f}.")
