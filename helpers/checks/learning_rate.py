"""The checks of notebook 06_learning_rate.

Each compares the answer with the right one and with what the likely mistakes give, on numbers for which they differ.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable

from helpers.checks.base import Hint, check

Recipe = dict[float, list[float]]


def valley(answer: Callable[[list[float], list[float]], float]) -> None:
    """Check `valley(rates, losses)`: the rate at the lowest point of the parabola through three (log, log) points."""

    def test() -> None:
        cases = [([1e-3, 2e-3, 5e-3], [0.4, 0.1, 0.3]), ([1e-4, 1e-3, 2e-3], [1.5, 0.2, 0.25])]
        cases += [([2e-3, 1e-2, 3e-2], [0.05, 0.04, 0.9])]
        results = [_number(answer(list(rates), list(losses)), "the rate") for rates, losses in cases]
        log = math.log
        right = [math.exp(_lowest(map(log, rates), map(log, losses))) for rates, losses in cases]
        _compare(
            results,
            right,
            [
                ([log(x) for x in right], "It returns the logarithm of the rate: take exp of it."),
                ([math.log10(x) for x in right], "It returns the logarithm of the rate: take 10 to its power."),
                (
                    [rates[losses.index(min(losses))] for rates, losses in cases],
                    "It returns the best of the three rates; the lowest point of the parabola lies between them.",
                ),
                (
                    [_lowest(rates, losses) for rates, losses in cases],
                    "It draws the parabola over the rate: take the logarithm of the rates and of the losses first.",
                ),
                (
                    [_lowest(rates, map(log, losses)) for rates, losses in cases],
                    "It draws the parabola over the rate: take the logarithm of the rates too.",
                ),
                (
                    [math.exp(_lowest(map(log, rates), losses)) for rates, losses in cases],
                    "It draws the loss itself: take the logarithm of the losses too.",
                ),
                (
                    [_as_if_evenly_spaced(rates, losses) for rates, losses in cases],
                    "It takes the three rates as evenly spaced on the log axis, and they are not.",
                ),
            ],
            [f"the rates {rates} and the losses {losses}" for rates, losses in cases],
        )

    check(answer, test, "Three runs say more than the best of them: the valley need not be on the grid.")


def same_first_step(answer: Callable[[float, float, int, float, int, bool], float]) -> None:
    """Check `same_first_step(learning_rate, alpha, r, new_alpha, new_r, rslora)`: lr x scaling x r stays the same."""

    def test() -> None:
        cases = [(1e-3, 16.0, 8, 32.0, 4, False), (2e-4, 32.0, 16, 128.0, 64, False), (5e-3, 8.0, 2, 16.0, 32, True)]
        cases += [(1e-3, 16.0, 4, 16.0, 64, True)]
        results = [_number(answer(*case), "the new rate") for case in cases]

        def new_rate(size: Callable[[float, int, bool], float]) -> list[float]:
            return [lr * size(a, r, rs) / size(new_a, new_r, rs) for lr, a, r, new_a, new_r, rs in cases]

        def scaling(alpha: float, r: int, rslora: bool) -> float:
            return alpha / (math.sqrt(r) if rslora else r)

        right = new_rate(lambda a, r, rs: scaling(a, r, rs) * r)
        _compare(
            results,
            right,
            [
                ([case[0] for case in cases], "It returns the old rate: what changes when alpha or r does?"),
                (
                    new_rate(lambda a, r, rs: scaling(a, r, rs)),
                    "It keeps rate x scaling the same. B A is a sum over r terms, and in the first step all of them "
                    "pull the same way: there is a factor of r as well.",
                ),
                (
                    new_rate(lambda a, r, rs: 1 / (scaling(a, r, rs) * r)),
                    "It is upside down: where the update is larger, the rate has to be smaller.",
                ),
                (new_rate(lambda a, r, rs: a), "With rslora the scaling is alpha / sqrt(r), so r does not cancel."),
                (
                    new_rate(lambda a, r, rs: a / math.sqrt(r) * r),
                    "Without rslora the scaling is alpha / r, not alpha / sqrt(r).",
                ),
                (
                    new_rate(lambda a, r, rs: scaling(a, r, rs) * math.sqrt(r)),
                    "It adds up r terms as if they were random, by sqrt(r). In the first step they all pull the same "
                    "way: the factor is r.",
                ),
                (
                    new_rate(lambda a, r, rs: scaling(a, r, rs) * r * r),
                    "It counts the r terms twice: rate x scaling x r is to stay the same.",
                ),
            ],
            [
                f"a rate of {lr:g}, alpha {a:g} -> {new_a:g}, r {r} -> {new_r} and rslora={rs}"
                for lr, a, r, new_a, new_r, rs in cases
            ],
        )

    check(
        answer, test, "With alpha / r the first step depends on alpha and not on r; with rsLoRA it grows with sqrt(r)."
    )


def better_recipe(answer: Callable[[Recipe, Recipe], str]) -> None:
    """Check `better_recipe(a, b)`: each at its own best rate, the difference against twice its standard error."""

    def test() -> None:
        # Each case is made for a mistake: with it, the answer changes.
        same = "It compares at the same rate for both; take each recipe at its own best rate."
        single = "It looks at the best single run. Choose a rate by the mean over its seeds."
        cases: list[tuple[Recipe, Recipe, str, str]] = [
            ({1e-3: [0.30, 0.31, 0.29]}, {1e-3: [0.20, 0.21, 0.19]}, "b", "It names the recipe with the higher loss."),
            ({1e-3: [0.50, 0.52, 0.51], 1e-2: [0.20, 0.21, 0.19]}, {1e-3: [0.30, 0.31], 1e-2: [0.90, 0.95]}, "a", same),
            ({1e-3: [0.30, 0.31, 0.29], 1e-2: [0.10, 0.90, 0.80]}, {1e-3: [0.20, 0.21, 0.19]}, "b", single),
            ({1e-3: [0.20, 0.21, 0.19], 1e-2: [0.10, 0.99, 0.99]}, {1e-3: [0.30, 0.31, 0.29]}, "a", single),
            (
                {1e-4: [math.nan, math.nan], 1e-3: [0.30, 0.31, 0.29]},
                {1e-4: [0.30, math.nan, 0.20], 1e-3: [0.20, 0.21, 0.19]},
                "b",
                "A run that diverged has the loss nan, and nan compares with nothing: leave out a rate that has one.",
            ),
            (
                {1e-3: [0.30, 0.31, 0.29]},
                {1e-4: [0.10, math.nan, 0.11], 1e-3: [0.40, 0.41, 0.39]},
                "a",
                "It drops the runs that diverged and keeps their rate. A rate with a nan among its losses is out.",
            ),
            (
                {1e-3: [0.20, 0.30, 0.40]},
                {1e-3: [0.25, 0.35, 0.45]},
                "undecided",
                "It decides although the difference is small beside the spread over the seeds.",
            ),
            (
                {1e-3: [0.30, 0.32, 0.34]},
                {1e-3: [0.277, 0.297, 0.317]},
                "undecided",
                "The bound is two standard errors. One is too few: chance alone passes it about every third time.",
            ),
            (
                {1e-3: [0.26, 0.34, 0.26, 0.34, 0.26, 0.34, 0.26, 0.34]},
                {1e-3: [0.19, 0.27, 0.19, 0.27, 0.19, 0.27, 0.19, 0.27]},
                "b",
                "It compares with the spread of single runs. The mean of n runs is surer than one: divide by sqrt(n).",
            ),
            (
                {1e-3: [0.30, 0.40]},
                {1e-3: [0.20, 0.28]},
                "undecided",
                "It divides by n in the variance, where n - 1 belongs: from two or three seeds that is too sure.",
            ),
            (
                {1e-3: [0.30, 0.34, 0.38]},
                {1e-3: [0.26, 0.28, 0.30]},
                "b",
                "The bound is twice the standard error of the difference: sqrt(variance of a / n + variance of b / m).",
            ),
        ]
        for a, b, expected, hint in cases:
            result = answer(copy.deepcopy(a), copy.deepcopy(b))
            if result not in ("a", "b", "undecided"):
                raise Hint(f'It returns {result!r}; return "a", "b" or "undecided".')
            if result != expected:
                raise Hint(f"{hint} (a = {a}, b = {b}: {expected}, not {result}.)")

    check(answer, test, "Own best rate, mean over seeds, twice the standard error: most small gains do not survive it.")


def successive_halving(
    answer: Callable[[Callable[[float, int], float], list[float], int], tuple[float, int]],
) -> None:
    """Check `successive_halving(train, rates, steps)` by the runs that it asks for."""

    def test() -> None:
        for rates, expected_rounds, best in (
            ([1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2], [6, 3, 2], 3e-3),
            ([1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1], [8, 4, 2], 3e-3),
        ):
            asked: list[tuple[float, int]] = []
            result = answer(_recording_train(asked), rates[::-1], 10)
            if not asked:
                raise Hint("It trains nothing: call train(rate, steps).")
            if not isinstance(result, tuple) or len(result) != 2:
                raise Hint(f"It returns {result!r}; return the rate that is left and the steps of all runs together.")
            budgets = sorted({steps for _, steps in asked})
            rounds = [[rate for rate, steps in asked if steps == budget] for budget in budgets]
            wanted = [10 * 2**i for i in range(len(expected_rounds))]
            if len(budgets) == 1 and len(asked) >= len(rates):
                raise Hint("All runs have the same length: double the steps after each round.")
            if sorted(rounds[0]) != rates or budgets[0] != 10:
                raise Hint("The first round trains every rate, each for `steps` steps.")
            if len(rounds[1]) == len(rates):
                raise Hint("Every rate is trained again: only the better half goes on.")
            if 1e-4 in rounds[1] and 3e-3 not in rounds[1]:
                raise Hint("It keeps the half with the higher loss.")
            if any(rate >= 0.03 for rate in rounds[1]):
                raise Hint("A run that diverged (loss nan) survives the round: count nan as the worst of all.")
            if budgets[: len(wanted)] != wanted[: len(budgets)]:
                raise Hint(f"The rounds have {budgets} steps; they should have {wanted}.")
            sizes = [len(group) for group in rounds]
            if sizes == [*expected_rounds, 1]:
                raise Hint("When one rate is left the search is over: it need not be trained again.")
            if sizes != expected_rounds:
                raise Hint(f"From {len(rates)} rates the rounds train {expected_rounds}, and it trains {sizes}.")
            rate, total = result
            if rate != best:
                raise Hint(f"The runs are right, and the rate that is left is {best:g}; it returns {rate!r}.")
            if total != sum(steps for _, steps in asked):
                raise Hint(f"It returns {total!r} steps; together its runs took {sum(s for _, s in asked)}.")

    check(answer, test, "Bad rates show early, so most of the steps go to the good ones.")


def _recording_train(asked: list[tuple[float, int]]) -> Callable[[float, int], float]:
    """A run of the kind that learns: too low is slow, 0.01 is best at first and unstable later, above is nan."""

    def train(rate: float, steps: int) -> float:
        asked.append((rate, steps))
        if rate >= 0.03:
            return math.nan
        speed = min(rate, 0.004)
        unstable = 0.4 * (rate == 0.01) * (steps > 10)
        return math.exp(-speed * steps * 20) + unstable - 0.05 * (rate == 0.01)

    return train


def _number(result: object, what: str) -> float:
    if result is None:
        raise Hint(f"It returns None; return {what}.")
    try:
        return float(result)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise Hint(f"It returns {type(result).__name__}; return {what} as one number.") from None


def _compare(
    results: list[float], right: list[float], mistakes: list[tuple[list[float], str]], cases: list[str]
) -> None:
    """Raise the hint of the mistake that gives these results, or else name the first case that differs."""

    def close(x: float, y: float) -> bool:
        return math.isclose(x, y, rel_tol=1e-4)

    def equal(a: list[float], b: list[float]) -> bool:
        return all(map(close, a, b))

    if equal(results, right):
        return
    for wrong, hint in mistakes:
        if equal(results, wrong):
            raise Hint(hint)
    result, wanted, case = next(row for row in zip(results, right, cases, strict=True) if not close(row[0], row[1]))
    raise Hint(f"For {case} it is {wanted:.6g}, not {result:.6g}.")


def _lowest(xs: Iterable[float], ys: Iterable[float]) -> float:
    """Return where the parabola through three points is flat."""
    (x0, x1, x2), (y0, y1, y2) = xs, ys
    slope_01, slope_12 = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    curvature = (slope_12 - slope_01) / (x2 - x0)
    return (x0 + x1) / 2 - slope_01 / (2 * curvature)


def _as_if_evenly_spaced(rates: list[float], losses: list[float]) -> float:
    low, middle, high = map(math.log, losses)
    step = (math.log(rates[2]) - math.log(rates[0])) / 2
    return math.exp(math.log(rates[1]) + step * (low - high) / (2 * (low - 2 * middle + high)))
