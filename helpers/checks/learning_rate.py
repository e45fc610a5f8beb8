"""The exercises of notebook 06_learning_rate: a right answer, and the likely wrong ones, each with its hint."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Sequence
from typing import Any

from helpers.checks.base import Answer, Exercise, Hint

Recipe = dict[float, list[float]]
NAN = math.nan


def _parabola(x_axis: Answer = math.log, y_axis: Answer = math.log, back: Answer = math.exp) -> Answer:
    """Return an answer that takes the lowest point of the parabola on these axes."""

    def function(rates: list[float], losses: list[float]) -> float:
        (x0, x1, x2), (y0, y1, y2) = map(x_axis, rates), map(y_axis, losses)
        slope_01, slope_12 = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
        return float(back((x0 + x1) / 2 - slope_01 * (x2 - x0) / (slope_12 - slope_01) / 2))

    return function


def _as_if_evenly_spaced(rates: list[float], losses: list[float]) -> float:
    low, middle, high = map(math.log, losses)
    step = math.log(rates[2] / rates[0]) / 2
    return rates[1] * math.exp(step * (low - high) / (2 * (low - 2 * middle + high)))


valley = Exercise(
    right=_parabola(),
    cases=[([1e-3, 2e-3, 5e-3], [0.4, 0.1, 0.3]), ([1e-4, 1e-3, 2e-3], [1.5, 0.2, 0.25]),
           ([2e-3, 1e-2, 3e-2], [0.05, 0.04, 0.9])],
    mistakes={
        "It returns the logarithm of the rate: take exp of it.": _parabola(back=float),
        "It returns the logarithm of the rate: take 10 to its power.": lambda *case: math.log10(_parabola()(*case)),
        "It returns the best of the three rates; the lowest point of the parabola lies between them.":
            lambda rates, losses: rates[losses.index(min(losses))],
        "It draws the parabola over the rate: take the logarithm of the rates and of the losses first.":
            _parabola(float, float, float),
        "It draws the parabola over the rate: take the logarithm of the rates too.": _parabola(float, math.log, float),
        "It draws the loss itself: take the logarithm of the losses too.": _parabola(y_axis=float),
        "It takes the three rates as evenly spaced on the log axis, and they are not.": _as_if_evenly_spaced,
    },
    returns="the rate",
    otherwise=lambda rates, losses, found, right: (
        f"For the rates {rates} and the losses {losses} it is {right:.6g}, not {found:.6g}."
    ),
    learned="Three runs say more than the best of them: the valley need not be on the grid.",
)  # fmt: skip


def _scaling(alpha: float, r: int, rslora: bool) -> float:
    return alpha / (math.sqrt(r) if rslora else r)


def _keeping(size: Answer) -> Answer:
    """Return an answer that keeps rate x size(alpha, r, rslora) the same."""
    return lambda lr, alpha, r, new_alpha, new_r, rslora: lr * size(alpha, r, rslora) / size(new_alpha, new_r, rslora)


same_first_step = Exercise(
    right=_keeping(lambda a, r, rslora: _scaling(a, r, rslora) * r),
    cases=[(1e-3, 16.0, 8, 32.0, 4, False), (2e-4, 32.0, 16, 128.0, 64, False), (5e-3, 8.0, 2, 16.0, 32, True),
           (1e-3, 16.0, 4, 16.0, 64, True)],
    mistakes={
        "It returns the old rate: what changes when alpha or r does?": lambda learning_rate, *rest: learning_rate,
        "It keeps rate x scaling the same. B A is a sum over r terms, and in the first step all of them pull the same "
        "way: there is a factor of r as well.": _keeping(_scaling),
        "It is upside down: where the update is larger, the rate has to be smaller.":
            _keeping(lambda a, r, rslora: 1 / (_scaling(a, r, rslora) * r)),
        "With rslora the scaling is alpha / sqrt(r), so r does not cancel.": _keeping(lambda a, r, rslora: a),
        "Without rslora the scaling is alpha / r, not alpha / sqrt(r).":
            _keeping(lambda a, r, rslora: a * math.sqrt(r)),
        "It adds up r terms as if they were random, by sqrt(r). In the first step they all pull the same way: the "
        "factor is r.": _keeping(lambda a, r, rslora: _scaling(a, r, rslora) * math.sqrt(r)),
        "It counts the r terms twice: rate x scaling x r is to stay the same.":
            _keeping(lambda a, r, rslora: _scaling(a, r, rslora) * r * r),
    },
    returns="the new rate",
    otherwise=lambda lr, a, r, new_a, new_r, rslora, found, right: (
        f"For a rate of {lr:g}, alpha {a:g} -> {new_a:g}, r {r} -> {new_r} and rslora={rslora} it is {right:.6g}, not "
        f"{found:.6g}."
    ),
    learned="With alpha / r the first step depends on alpha and not on r; with rsLoRA it grows with sqrt(r).",
)  # fmt: skip


def _standard_error(x: Sequence[float], y: Sequence[float]) -> float:
    return math.sqrt(statistics.variance(x) / len(x) + statistics.variance(y) / len(y))


def _best_rate(recipe: Recipe) -> list[float]:
    whole = [losses for losses in recipe.values() if not any(map(math.isnan, losses))]
    return min(whole, key=statistics.fmean)


def _recipe(choose: Answer = _best_rate, error: Answer = _standard_error, bound: float = 2.0, sign: int = 1) -> Answer:
    """Return an answer that compares the runs that it chooses with so many times an error."""

    def function(a: Recipe, b: Recipe) -> str:
        x, y = choose(a), choose(b)
        difference = statistics.fmean(x) - statistics.fmean(y)
        if abs(difference) <= bound * error(x, y):
            return "undecided"
        return "b" if sign * difference > 0 else "a"

    return function


def _single(recipe: Recipe) -> list[float]:
    return min(recipe.values(), key=lambda losses: min(x for x in [*losses, math.inf] if x == x))


def _without_the_nan_runs(recipe: Recipe) -> list[float]:
    return _best_rate({rate: left for rate, all_of in recipe.items() if len(left := [x for x in all_of if x == x]) > 1})


# Each hint with the cases that are made for it, (a, b, the answer), and with wrong answers.
Made = tuple[list[tuple[Recipe, Recipe]], Answer | list[Answer]]
RECIPES: dict[str, Made] = {
    "It names the recipe with the higher loss.": (
        [({1e-3: [0.30, 0.31, 0.29]}, {1e-3: [0.20, 0.21, 0.19]})],
        _recipe(sign=-1)),
    "It compares at the same rate for both; take each recipe at its own best rate.": (
        [({1e-3: [0.50, 0.52, 0.51], 1e-2: [0.20, 0.21, 0.19]}, {1e-3: [0.30, 0.31], 1e-2: [0.90, 0.95]})],
        _recipe(lambda recipe: next(losses for losses in recipe.values() if not any(map(math.isnan, losses))))),
    "It looks at the best single run. Choose a rate by the mean over its seeds.": (
        [({1e-3: [0.30, 0.31, 0.29], 1e-2: [0.10, 0.90, 0.80]}, {1e-3: [0.20, 0.21, 0.19]}),
         ({1e-3: [0.20, 0.21, 0.19], 1e-2: [0.10, 0.99, 0.99]}, {1e-3: [0.30, 0.31, 0.29]})],
        [_recipe(_single), lambda a, b: "a" if min(_single(a)) < min(_single(b)) else "b"]),
    "A run that diverged has the loss nan, and nan compares with nothing: leave out a rate that has one.": (
        [({1e-4: [NAN, NAN], 1e-3: [0.30, 0.31, 0.29]}, {1e-4: [0.30, NAN, 0.20], 1e-3: [0.20, 0.21, 0.19]})],
        _recipe(lambda recipe: min(recipe.values(), key=statistics.fmean))),
    "It drops the runs that diverged and keeps their rate. A rate with a nan among its losses is out.": (
        [({1e-3: [0.30, 0.31, 0.29]}, {1e-4: [0.10, NAN, 0.11], 1e-3: [0.40, 0.41, 0.39]})],
        _recipe(_without_the_nan_runs)),
    "It decides although the difference is small beside the spread over the seeds.": (
        [({1e-3: [0.20, 0.30, 0.40]}, {1e-3: [0.25, 0.35, 0.45]})],
        _recipe(bound=0)),
    "The bound is two standard errors. One is too few: chance alone passes it about every third time.": (
        [({1e-3: [0.30, 0.32, 0.34]}, {1e-3: [0.277, 0.297, 0.317]})],
        _recipe(bound=1)),
    "It compares with the spread of single runs. The mean of n runs is surer than one: divide by sqrt(n).": (
        [({1e-3: [0.26, 0.34] * 4}, {1e-3: [0.19, 0.27] * 4})],
        _recipe(error=lambda x, y: math.sqrt(statistics.variance(x) + statistics.variance(y)))),
    "It divides by n in the variance, where n - 1 belongs: from two or three seeds that is too sure.": (
        [({1e-3: [0.30, 0.40]}, {1e-3: [0.20, 0.28]})],
        _recipe(error=lambda x, y: math.sqrt(statistics.pvariance(x) / len(x) + statistics.pvariance(y) / len(y)))),
    "The bound is twice the standard error of the difference: sqrt(variance of a / n + variance of b / m).": (
        [({1e-3: [0.30, 0.34, 0.38]}, {1e-3: [0.26, 0.28, 0.30]})],
        _recipe(error=lambda x, y: sum(statistics.stdev(losses) / len(losses) ** 0.5 for losses in (x, y)))),
}  # fmt: skip


def _recipe_hint(a: Recipe, b: Recipe, found: str, right: str) -> str:
    if found not in ("a", "b", "undecided"):
        return f'It returns {found!r}; return "a", "b" or "undecided".'
    hint = next(hint for hint, (cases, _) in RECIPES.items() if (a, b) in cases)
    return f"{hint} (a = {a}, b = {b}: {right}, not {found}.)"


better_recipe = Exercise(
    right=_recipe(),
    cases=[case for cases, _ in RECIPES.values() for case in cases],
    run=lambda answer, *case: answer(*copy.deepcopy(case)),  # which it may change
    mistakes={hint: wrong for hint, (_, wrong) in RECIPES.items()},
    returns='"a", "b" or "undecided"',
    otherwise=_recipe_hint,
    learned="Own best rate, mean over seeds, twice the standard error: most small gains do not survive it.",
)


def _watch(answer: Answer, rates: list[float], steps: int) -> tuple[list[tuple[int, list[float]]], float, int]:
    """Return the rounds that an answer trains, each (its steps, its rates), and what it returns.

    A run learns in this way: too low a rate is slow, 0.01 is best at first and unstable later, above is nan.
    """
    rounds: dict[int, list[float]] = {}

    def train(rate: float, steps: int) -> float:
        rounds.setdefault(steps, []).append(rate)
        if rate >= 0.03:
            return NAN
        return math.exp(-min(rate, 0.004) * steps * 20) + (rate == 0.01) * (0.35 if steps > 10 else -0.05)

    result = answer(train, list(rates), steps)
    if not rounds:
        raise Hint("It trains nothing: call train(rate, steps).")
    if not isinstance(result, tuple) or len(result) != 2:
        raise Hint(f"It returns {result!r}; return the rate that is left and the steps of all runs together.")
    if not set(rates) <= set(rounds.get(steps, [])) or min(rounds) != steps:
        raise Hint("The first round trains every rate, each for `steps` steps.")
    return [(budget, sorted(rounds[budget])) for budget in sorted(rounds)], *result


def _halving(worst: float = math.inf, keep: Answer = lambda n: math.ceil(n / 2), grow: int = 2, again: bool = False,
             last: bool = False, sign: int = 1) -> Answer:  # fmt: skip
    """Return an answer in which a part is exchanged; `worst` stands for nan."""

    def function(train: Answer, rates: list[float], steps: int) -> tuple[float, int]:
        total, all_of_them = 0, list(rates)
        while len(rates) > 1:
            losses = {rate: train(rate, steps) for rate in (all_of_them if again else rates)}
            total += steps * len(losses)
            losses = {rate: worst if math.isnan(loss) else sign * loss for rate, loss in losses.items()}
            rates, steps = sorted(rates, key=losses.__getitem__)[: keep(len(rates))], grow * steps
        if last:
            train(rates[0], steps)
        return rates[0], total + steps * last

    return function


def _halving_hint(rates: list[float], steps: int, found: Any, right: Any) -> str:
    (rounds, rate, total), (wanted, best, _) = found, right
    if rounds == wanted:
        return f"The runs are right, and the rate that is left is {best:g}; it returns {rate!r}." if rate != best else (
            f"It returns {total!r} steps; together its runs took {right[2]}.")  # fmt: skip
    budgets, wanted_budgets = ([budget for budget, _ in each] for each in (rounds, wanted))
    if any(rate >= 0.03 for _, group in rounds[1:] for rate in group):
        return DIVERGED
    if budgets[: len(wanted)] != wanted_budgets[: len(budgets)]:
        return f"The rounds have {budgets} steps; they should have {wanted_budgets}."
    sizes, right_sizes = ([len(group) for _, group in each] for each in (rounds, wanted))
    return f"From {len(rates)} rates the rounds train {right_sizes}, and it trains {sizes}."


DIVERGED = "A run that diverged (loss nan) survives the round: count nan as the worst of all."
RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
successive_halving = Exercise(
    right=_halving(),
    cases=[(RATES[5::-1], 10), (RATES[::-1], 10)],
    run=_watch,
    mistakes={
        "All runs have the same length: double the steps after each round.": _halving(grow=1),
        "Every rate is trained again: only the better half goes on.": _halving(again=True),
        "It keeps the half with the higher loss.": [_halving(sign=-1), _halving(-math.inf, sign=-1)],
        DIVERGED: [_halving(NAN), _halving(-math.inf)],
        "When one rate is left the search is over: it need not be trained again.": _halving(last=True),
    },
    otherwise=_halving_hint,
    learned="Bad rates show early, so most of the steps go to the good ones.",
)
