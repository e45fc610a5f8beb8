"""The checks of notebook 05: the solution passes, the stub does not, and each mistake gets its hint."""

import math
from functools import partial

from helpers.checks import trainer as checks

import numpy as np
import pytest
import torch
from exercises import exercise_functions, exercise_tests, said
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

STUBS, SOLUTIONS = exercise_functions("05_trainer")
_said = partial(said, checks)


def _nothing(*arguments):
    return None


# resume_from(found, needed)


def _numbers(found):
    return {int(name[11:]): name for name in found if name.startswith("checkpoint-") and name[11:].isdigit()}


def _newest(found, whole):
    """The checkpoint with the highest number for whose files `whole` holds, or None."""
    numbers = _numbers(found)
    return next((numbers[n] for n in sorted(numbers, reverse=True) if whole(found[numbers[n]])), None)


def _highest(found, needed):
    return _newest(found, lambda files: True)


def _as_text(found, needed):
    complete = [name for name in _numbers(found).values() if all(found[name].get(file) for file in needed)]
    return max(complete, default=None)


def _oldest(found, needed):
    numbers = {n: name for n, name in _numbers(found).items() if all(found[name].get(file) for file in needed)}
    return numbers[min(numbers)] if numbers else None


def _presence(found, needed):
    return _newest(found, lambda files: all(file in files for file in needed))


def _no_missing(found, needed):
    return _newest(found, lambda files: all(files.values()))


def _needed_if_there(found, needed):
    return _newest(found, lambda files: all(files.get(file, True) for file in needed))


def _state_only(found, needed):
    return _newest(found, lambda files: files.get("trainer_state.json", False))


def _everything(found, needed):
    return _newest(found, lambda files: all(files.get(file) for file in needed) and all(files.values()))


def _gives_up(found, needed):
    newest = _highest(found, needed)
    return newest if newest and all(found[newest].get(file) for file in needed) else None


def _number_only(found, needed):
    name = _newest(found, lambda files: all(files.get(file) for file in needed))
    return int(name[11:]) if name else None


def _best_too(found, needed):
    complete = [name for name in found if name.startswith("checkpoint") and all(found[name].get(f) for f in needed)]
    return max(complete, key=lambda name: int(name[11:]) if name[11:].isdigit() else math.inf, default=None)


def _any_number(found, needed):
    numbers = [name.removeprefix("checkpoint-") for name in found if all(found[name].get(file) for file in needed)]
    return f"checkpoint-{max(int(n) for n in numbers if n.isdigit())}" if any(n.isdigit() for n in numbers) else None


def _split(found, needed):
    complete = [int(name.split("-")[1]) for name in found if all(found[name].get(file) for file in needed)]
    return f"checkpoint-{max(complete)}" if complete else None


def _split_of_all(found, needed):
    numbers = {int(name.split("-")[1]): name for name in found}
    return next((numbers[n] for n in sorted(numbers)[::-1] if all(found[numbers[n]].get(f) for f in needed)), None)


def _no_default(found, needed):
    complete = [n for n, name in _numbers(found).items() if all(found[name].get(file) for file in needed)]
    return f"checkpoint-{sorted(complete)[-1]}"


def _other_value_error(found, needed):
    if "runs" in found:
        raise ValueError("something else")
    return "checkpoint-12"


def _empty_text(found, needed):
    return SOLUTIONS["resume_from"](found, needed) or ""


# token_accuracy(predictions, labels)


def _hits(predictions, labels):
    return predictions[:, :-1].argmax(-1) == labels[:, 1:]


def _unshifted(predictions, labels):
    return (predictions.argmax(-1) == labels)[labels != -100].mean()


def _unshifted_unmasked(predictions, labels):
    return (predictions.argmax(-1) == labels).mean()


def _backwards(predictions, labels):
    return (predictions[:, 1:].argmax(-1) == labels[:, :-1])[labels[:, :-1] != -100].mean()


def _before_the_shift(predictions, labels):
    return _hits(predictions, labels).sum() / (labels != -100).sum()


def _all_positions(predictions, labels):
    return _hits(predictions, labels).mean()


def _masked_counts_as_right(predictions, labels):
    return (_hits(predictions, labels) | (labels[:, 1:] == -100)).mean()


def _mean_of_rows(predictions, labels):
    hits, mask = _hits(predictions, labels), labels[:, 1:] != -100
    return np.mean([row[kept].mean() for row, kept in zip(hits, mask, strict=True)])


def _whole_rows(predictions, labels):
    return (_hits(predictions, labels) | (labels[:, 1:] == -100)).all(1).mean()


def _count(predictions, labels):
    return _hits(predictions, labels).sum()


def _wrong_share(predictions, labels):
    return 1 - SOLUTIONS["token_accuracy"](predictions, labels)


def _as_dict(predictions, labels):
    return {"accuracy": SOLUTIONS["token_accuracy"](predictions, labels)}


def _as_array(predictions, labels):
    return _hits(predictions, labels)


def _as_tensor(predictions, labels):
    return torch.tensor(SOLUTIONS["token_accuracy"](predictions, labels))


def _half(predictions, labels):
    return SOLUTIONS["token_accuracy"](predictions, labels) / 2


# early_stopping(losses, patience)


def _stops(losses, patience, late=0, previous=False, reset=True, tie=False):
    best, waited = 0, 0
    for i in range(1, len(losses)):
        bound = losses[i - 1] if previous else losses[best]
        better = losses[i] <= bound if tie else losses[i] < bound
        waited = (0 if reset else waited) if better else waited + 1
        if losses[i] < losses[best]:
            best = i
        if waited >= patience + late:
            return i + 1, best + 1
    return len(losses), best + 1


def _too_late(losses, patience):
    return _stops(losses, patience, late=1)


def _previous(losses, patience):
    return _stops(losses, patience, previous=True)


def _never_reset(losses, patience):
    return _stops(losses, patience, reset=False)


def _tie(losses, patience):
    return _stops(losses, patience, tie=True)


def _from_zero(losses, patience):
    return tuple(number - 1 for number in _stops(losses, patience))


def _swapped(losses, patience):
    return _stops(losses, patience)[::-1]


def _last_is_best(losses, patience):
    return (_stops(losses, patience)[0],) * 2


def _looks_ahead(losses, patience):
    return _stops(losses, patience)[0], 1 + losses.index(min(losses))


def _lowest_of_all(losses, patience):
    best = losses.index(min(losses))
    return min(best + patience + 1, len(losses)), best + 1


def _lowest_of_all_and_on(losses, patience):
    best = losses.index(min(losses))
    return best + patience + 1, best + 1


def _only_if_it_stops(losses, patience):
    stop, best = _stops(losses, patience)
    return (stop, best) if stop < len(losses) else None


def _one_number(losses, patience):
    return _stops(losses, patience)[0]


def _no_stop(losses, patience):
    return len(losses), 1 + losses.index(min(losses))


# diverged(logs)


def _loss_only(logs):
    return not math.isfinite(logs.get("loss", 0.0))


def _zero_loss(logs):
    return logs.get("loss") == 0.0 or any(not math.isfinite(value) for value in logs.values())


def _equals_nan(logs):
    return any(value == float("nan") for value in logs.values())


def _nan_only(logs):
    return any(math.isnan(value) for value in logs.values())


def _norm_only(logs):
    return not math.isfinite(logs.get("grad_norm", 0.0))


def _no_get(logs):
    return not (math.isfinite(logs["loss"]) and math.isfinite(logs["grad_norm"]))


def _wrong_way_round(logs):
    return all(math.isfinite(value) for value in logs.values())


def _threshold(logs):
    return logs.get("grad_norm", 0.0) > 100 or any(not math.isfinite(value) for value in logs.values())


def _none_if_healthy(logs):
    return True if any(not math.isfinite(value) for value in logs.values()) else None


WRONG = [
    ("resume_from", _highest, "as the Trainer does"),
    ("resume_from", _as_text, "sorts the names as text"),
    ("resume_from", _oldest, "takes the oldest"),
    ("resume_from", _presence, "not whether it reaches its end"),
    ("resume_from", _no_missing, "a needed one is missing"),
    ("resume_from", _needed_if_there, "a needed one is missing"),
    ("resume_from", _state_only, "One file is not enough"),
    ("resume_from", _everything, "because of its README.md"),
    ("resume_from", _gives_up, "go on to the one before"),
    ("resume_from", _number_only, "It returns a number"),
    ("resume_from", _best_too, "checkpoint-best has no number"),
    ("resume_from", _any_number, "A folder called 12"),
    ("resume_from", _split, "There are folders that are not checkpoint-N: skip them"),
    ("resume_from", _split_of_all, "There are folders that are not checkpoint-N: skip them"),
    ("resume_from", _no_default, "it raises IndexError: return None there"),
    ("resume_from", _empty_text, "the answer is None, and it says ''"),
    ("resume_from", _nothing, "returns None in every case"),
    ("token_accuracy", _unshifted, "are not shifted"),
    ("token_accuracy", _unshifted_unmasked, "divides by all positions"),
    ("token_accuracy", _backwards, "Shifted the wrong way"),
    ("token_accuracy", _before_the_shift, "count the labels after the shift"),
    ("token_accuracy", _all_positions, "divides by all positions"),
    ("token_accuracy", _masked_counts_as_right, "divides by all positions"),
    ("token_accuracy", _mean_of_rows, "mean of the rows' accuracies"),
    ("token_accuracy", _whole_rows, "the share of rows"),
    ("token_accuracy", _count, "the number of right tokens"),
    ("token_accuracy", _wrong_share, "the share of wrong tokens"),
    ("token_accuracy", _as_dict, "It returns a dict"),
    ("token_accuracy", _as_array, "It returns ndarray"),
    ("token_accuracy", _as_tensor, "It returns Tensor with one number in it: return float(…)"),
    ("token_accuracy", _half, "On our rows it should be"),
    ("token_accuracy", _nothing, "It returns NoneType"),
    ("early_stopping", _too_late, "one evaluation late"),
    ("early_stopping", _previous, "compares with the evaluation before"),
    ("early_stopping", _never_reset, "never starts counting again"),
    ("early_stopping", _tie, "An equal loss is not better"),
    ("early_stopping", _from_zero, "counts from 0"),
    ("early_stopping", _swapped, "are swapped"),
    ("early_stopping", _last_is_best, "The best model is not the last one"),
    ("early_stopping", _looks_ahead, "has looked ahead"),
    ("early_stopping", _lowest_of_all, "has looked ahead"),
    ("early_stopping", _lowest_of_all_and_on, "has looked ahead"),
    ("early_stopping", _only_if_it_stops, "also for a run that reaches its end"),
    ("early_stopping", _one_number, "Return two numbers"),
    ("early_stopping", _no_stop, "it is (8, 5), and it says (9, 9)"),
    ("early_stopping", _nothing, "returns None"),
    ("diverged", _loss_only, "It trusts the loss"),
    ("diverged", _zero_loss, "A loss of 0.0 alone is no proof"),
    ("diverged", _equals_nan, "NaN equals nothing"),
    ("diverged", _nan_only, "finds NaN and not infinity"),
    ("diverged", _norm_only, "does not look at eval_loss"),
    ("diverged", _no_get, "an evaluation logs eval_loss and no grad_norm"),
    ("diverged", _wrong_way_round, "the wrong way round"),
    ("diverged", _threshold, "A large loss or gradient is finite"),
    ("diverged", _none_if_healthy, "returns None"),
    ("diverged", _nothing, "returns None"),
]


test_the_solution_passes_and_the_stub_does_not, test_a_mistake_gets_its_hint = exercise_tests(
    checks, STUBS, SOLUTIONS, WRONG
)


def test_other_right_answers_pass(capsys):
    """A list for a tuple, NumPy's and torch's numbers, and answers that change what they are given."""

    def consumes(found, needed):
        result = SOLUTIONS["resume_from"](found, needed)
        found.clear()
        needed.clear()
        return result

    def by_torch(predictions, labels):
        chosen, targets = torch.tensor(predictions)[:, :-1].argmax(-1), torch.tensor(labels)[:, 1:]
        return (chosen == targets)[targets != -100].double().mean().item()

    assert ": correct." in _said(capsys, "resume_from", consumes)
    assert ": correct." in _said(capsys, "token_accuracy", by_torch)
    assert ": correct." in _said(capsys, "early_stopping", lambda losses, patience: list(_stops(losses, patience)))
    assert ": correct." in _said(capsys, "diverged", lambda logs: ~np.isfinite(list(logs.values())).all())


def test_an_error_in_the_answer_is_reported_and_not_raised(capsys):
    assert "your function raised TypeError" in _said(capsys, "token_accuracy", lambda predictions: 1.0)
    assert "your function raised ValueError: something else" in _said(capsys, "resume_from", _other_value_error)


@pytest.mark.parametrize("patience", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
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
    assert SOLUTIONS["early_stopping"](losses, patience) == (number, best)
