"""The checks of notebook 06: the solution passes, the stub does not, and each mistake gets its hint."""

import math
import statistics
from functools import partial

from helpers.checks import learning_rate as checks

import numpy as np
import torch
from exercises import exercise_functions, exercise_tests, said

STUBS, SOLUTIONS = exercise_functions("06_learning_rate")
_said = partial(said, checks)


# valley(rates, losses)


def _polyfit(x_axis, y_axis, back):
    def valley(rates, losses):
        a, b, _ = np.polyfit(x_axis(np.array(rates)), y_axis(np.array(losses)), 2)
        return back(-b / (2 * a))

    return valley


def _same(values):
    return values


def _evenly(rates, losses):
    low, middle, high = map(math.log, losses)
    step = math.log(rates[2] / rates[0]) / 2
    return rates[1] * math.exp(step * (low - high) / (2 * (low - 2 * middle + high)))


# same_first_step(learning_rate, alpha, r, new_alpha, new_r, rslora)


def _convert(size):
    return lambda lr, a, r, new_a, new_r, rs: lr * size(a, r, rs) / size(new_a, new_r, rs)


def _scaling(alpha, r, rslora):
    return alpha / (r**0.5 if rslora else r)


def _wrong_with_rslora(*case):
    return case[0] if case[-1] else SOLUTIONS["same_first_step"](*case)


def _wrong_in_the_last_case(rates, losses):
    return rates[0] if rates[0] == 2e-3 else SOLUTIONS["valley"](rates, losses)


# better_recipe(a, b)


def _recipe(choose=None, error=None, bound=2.0, skip_nan=True, lower_wins=True):
    """The solution, with one part exchanged."""

    def default_choose(recipe):
        means = {rate: statistics.fmean(losses) for rate, losses in recipe.items()}
        if skip_nan:
            means = {rate: loss for rate, loss in means.items() if not math.isnan(loss)}
        return recipe[min(means, key=means.get)]

    def default_error(x, y):
        return math.sqrt(statistics.variance(x) / len(x) + statistics.variance(y) / len(y))

    def better_recipe(a, b):
        x, y = (choose or default_choose)(a), (choose or default_choose)(b)
        difference = statistics.fmean(x) - statistics.fmean(y)
        if not abs(difference) > bound * (error or default_error)(x, y):
            return "undecided"
        return "b" if (difference > 0) == lower_wins else "a"

    return better_recipe


def _at_the_first_rate(recipe):
    return next(losses for losses in recipe.values() if not any(map(math.isnan, losses)))


def _by_best_run(recipe):
    return min(recipe.values(), key=lambda losses: min(x if x == x else math.inf for x in losses))


def _lowest_run(a, b):
    x, y = (min(v for losses in recipe.values() for v in losses if v == v) for recipe in (a, b))
    return "a" if x < y else "b"


def _without_the_nan_runs(recipe):
    left = [[x for x in losses if x == x] for losses in recipe.values()]
    return min((losses for losses in left if len(losses) > 1), key=statistics.fmean)


def _spread_of_runs(x, y):
    return math.sqrt(statistics.variance(x) + statistics.variance(y))


def _population(x, y):
    return math.sqrt(statistics.pvariance(x) / len(x) + statistics.pvariance(y) / len(y))


def _sum_of_errors(x, y):
    return sum(statistics.stdev(v) / len(v) ** 0.5 for v in (x, y))


# successive_halving(train, rates, steps)


def _halving(
    worst=math.inf, keep=lambda n: math.ceil(n / 2), grow=2, all_rates=False, last=False, reverse=False, count=True
):
    def successive_halving(train, rates, steps):
        total, everything = 0, list(rates)
        while len(rates) > 1:
            losses = {rate: train(rate, steps) for rate in (everything if all_rates else rates)}
            total += steps * len(losses)
            key = {rate: worst if worst is not None and loss != loss else loss for rate, loss in losses.items()}
            rates = sorted(rates, key=key.get, reverse=reverse)[: keep(len(rates))]
            steps *= grow
        if last:
            train(rates[0], steps)
        return rates[0], total if count else steps

    return successive_halving


WRONG = [
    ("valley", lambda r, x: np.log(SOLUTIONS["valley"](r, x)), "take exp"),
    ("valley", lambda r, x: math.log10(SOLUTIONS["valley"](r, x)), "10 to its power"),
    ("valley", lambda r, x: r[x.index(min(x))], "the best of the three rates"),
    ("valley", _polyfit(_same, _same, _same), "over the rate: take the logarithm of the rates and of the losses"),
    ("valley", _polyfit(_same, np.log, _same), "take the logarithm of the rates too"),
    ("valley", _polyfit(np.log, _same, np.exp), "take the logarithm of the losses too"),
    ("valley", _evenly, "evenly spaced"),
    ("valley", lambda r, x: r[0], "it is 0.00"),
    ("valley", _wrong_in_the_last_case, "For the rates [0.002, 0.01, 0.03]"),
    ("valley", lambda r, x: None, "returns None"),
    ("valley", lambda r, x: [r[0], x[0]], "returns list"),
    ("same_first_step", lambda lr, *rest: lr, "returns the old rate"),
    ("same_first_step", _convert(_scaling), "there is a factor of r"),
    ("same_first_step", _convert(lambda a, r, rs: 1 / (_scaling(a, r, rs) * r)), "upside down"),
    ("same_first_step", _convert(lambda a, r, rs: a), "r does not cancel"),
    ("same_first_step", _convert(lambda a, r, rs: a * r**0.5), "Without rslora"),
    ("same_first_step", _convert(lambda a, r, rs: _scaling(a, r, rs) * r**0.5), "as if they were random"),
    ("same_first_step", _convert(lambda a, r, rs: _scaling(a, r, rs) * r * r), "counts the r terms twice"),
    ("same_first_step", lambda *case: 1.0, "it is 0.0005, not 1"),
    ("same_first_step", _wrong_with_rslora, "rslora=True it is 0.000625, not 0.005"),
    ("same_first_step", lambda *case: None, "returns None"),
    ("better_recipe", _recipe(lower_wins=False), "the higher loss"),
    ("better_recipe", _recipe(choose=_at_the_first_rate), "the same rate for both"),
    ("better_recipe", _recipe(choose=_by_best_run), "the best single run"),
    ("better_recipe", _lowest_run, "the best single run"),
    ("better_recipe", _recipe(skip_nan=False), "leave out a rate that has one"),
    ("better_recipe", _recipe(choose=_without_the_nan_runs), "A rate with a nan among its losses is out"),
    ("better_recipe", _recipe(bound=1.0), "One is too few"),
    ("better_recipe", _recipe(bound=0.0), "small beside the spread"),
    ("better_recipe", _recipe(error=_spread_of_runs), "divide by sqrt(n)"),
    ("better_recipe", _recipe(error=_population), "n - 1 belongs"),
    ("better_recipe", _recipe(error=_sum_of_errors), "standard error of the difference"),
    ("better_recipe", lambda a, b: None, "returns None"),
    ("better_recipe", lambda a, b: True, "returns True"),
    ("successive_halving", lambda train, rates, steps: (rates[0], 0), "trains nothing"),
    ("successive_halving", lambda train, rates, steps: train(rates[0], steps), "return the rate that is left"),
    ("successive_halving", lambda train, rates, steps: (train(rates[0], steps), 10), "first round trains every rate"),
    ("successive_halving", _halving(grow=1), "same length"),
    ("successive_halving", _halving(grow=3), "The rounds have"),
    ("successive_halving", _halving(all_rates=True), "trained again"),
    ("successive_halving", _halving(reverse=True, worst=-math.inf), "the higher loss"),
    ("successive_halving", _halving(worst=None), "count nan as the worst"),
    ("successive_halving", _halving(worst=-math.inf), "count nan as the worst"),
    ("successive_halving", _halving(keep=lambda n: n // 2), "the rounds train [6, 3, 2]"),
    ("successive_halving", _halving(last=True), "need not be trained again"),
    ("successive_halving", _halving(count=False), "together its runs took"),
    ("successive_halving", lambda *case: (case[1][0], _halving()(*case)[1]), "the rate that is left is 0.003"),
]


test_the_solution_passes_and_the_stub_does_not, test_a_mistake_gets_its_hint = exercise_tests(
    checks, STUBS, SOLUTIONS, WRONG
)


def test_other_right_answers_pass(capsys):
    def valley_as_tensor(rates, losses):
        return torch.tensor(_polyfit(np.log10, np.log10, lambda x: 10**x)(rates, losses))

    def clearing_its_input(a, b):
        chosen = _recipe()(a, b)
        a.clear()
        b.clear()
        return chosen

    assert ": correct." in _said(capsys, "valley", valley_as_tensor)
    assert ": correct." in _said(capsys, "better_recipe", clearing_its_input)
    assert ": correct." in _said(capsys, "successive_halving", _halving())


def test_an_error_in_the_answer_is_reported_and_not_raised(capsys):
    assert "your function raised TypeError" in _said(capsys, "valley", lambda rates: rates)
