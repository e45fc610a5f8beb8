"""The checks of notebook 05_trainer.

Each compares the answers to all of its cases with the right ones and with what the likely mistakes give.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

from helpers.checks.base import Hint, check
from helpers.data import IGNORE_INDEX

import numpy as np

Found = dict[str, dict[str, bool]]
NEEDED = ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
NAN, INFINITY = float("nan"), float("inf")


def token_accuracy(answer: Callable[[np.ndarray, np.ndarray], float]) -> None:
    """Check `token_accuracy(predictions, labels)`: shifted by one, and over the label tokens of all rows alike."""

    def test() -> None:
        generator = np.random.default_rng(0)
        labels = np.full((4, 9), IGNORE_INDEX)
        for row, (start, stop) in enumerate([(4, 6), (2, 9), (0, 3), (5, 9)]):  # the third has a label at position 0
            labels[row, start:stop] = generator.integers(0, 4, stop - start)
        predictions = generator.normal(size=(4, 9, 4))
        for row, position, share in ((0, 3, 1), (1, 1, 1), (1, 4, 1), (1, 6, 1), (3, 4, 1), (2, 1, 1)):
            predictions[row, position, labels[row, position + 1]] += 9 * share
        predictions[2, 3:] = IGNORE_INDEX  # the Trainer fills up shorter batches with -100
        result = answer(predictions.copy(), labels.copy())
        if isinstance(result, dict):
            raise Hint("It returns a dict; return the number, and compute_metrics will give it its name.")
        if not np.isscalar(result) and getattr(result, "ndim", None) == 0:
            raise Hint(f"It returns {type(result).__name__} with one number in it: return float(…) of it.")
        if not isinstance(result, int | float | np.number):
            raise Hint(f"It returns {type(result).__name__}; return one number from 0 to 1.")

        chosen = predictions.argmax(-1)
        here, there = chosen[:, :-1] == labels[:, 1:], chosen[:, 1:] == labels[:, :-1]
        mask = labels[:, 1:] != IGNORE_INDEX
        whole = labels != IGNORE_INDEX
        shift = "Nothing predicts a row's first token: count the labels after the shift, in labels[:, 1:]."
        everywhere = "It divides by all positions, prompt and padding too: count only where the label is not -100."
        mistakes = [
            ((chosen == labels)[whole].mean(), "Predictions and labels are not shifted: position t predicts t + 1."),
            ((chosen == labels)[whole].sum() / labels.size, everywhere),
            (there[whole[:, :-1]].mean(), "Shifted the wrong way: predictions[:, :-1] belong to labels[:, 1:]."),
            (here.sum() / whole.sum(), shift),
            (here.mean(), everywhere),
            (here.sum() / labels.size, everywhere),
            (here.sum(), "This is the number of right tokens: divide by the number of label tokens."),
            ((here | ~mask).mean(), everywhere),
            (
                (here * mask).sum(1) @ (1 / mask.sum(1)) / len(mask),
                "This is the mean of the rows' accuracies, in which a token of a short answer counts for more: divide "
                "all right tokens by all label tokens.",
            ),
            ((here | ~mask).all(1).mean(), "This is the share of rows that are right throughout: count tokens."),
            (1 - here[mask].mean(), "This is the share of wrong tokens."),
        ]
        right = here[mask].mean()
        for wrong, hint in mistakes:
            if not math.isclose(result, right) and math.isclose(result, wrong):
                raise Hint(hint)
        if not math.isclose(result, right):
            raise Hint(f"On our rows it should be {right:.4f}, and it is {result:.4f}.")

    check(answer, test, "Shifted by one, masked, and every label token counts the same.")


def resume_from(answer: Callable[[Found, list[str]], str | None]) -> None:
    """Check `resume_from(found, needed)`: the highest number whose needed files are all there and whole."""

    def test() -> None:
        whole = dict.fromkeys([*NEEDED, "README.md"], True)
        no_random_state = {name: True for name in whole if name != "rng_state.pth"}
        cases: list[tuple[str, Found, str | None]] = [
            ("of three complete ones", {f"checkpoint-{n}": whole for n in (9, 12, 3)}, "checkpoint-12"),
            ("12's optimizer.pt breaks off", _twelve(whole | {"optimizer.pt": False}), "checkpoint-9"),
            ("12 has no rng_state.pth", _twelve(no_random_state), "checkpoint-9"),
            ("12 has no file at all", _twelve({}), "checkpoint-9"),
            ("12's README.md breaks off", _twelve(whole | {"README.md": False}), "checkpoint-12"),
            ("there is a folder checkpoint-best", _twelve(whole) | {"checkpoint-best": whole}, "checkpoint-12"),
            ("there is a folder 12", {"checkpoint-9": whole, "12": whole}, "checkpoint-9"),
            ("no checkpoint is complete", {"checkpoint-9": no_random_state, "runs": {}}, None),
        ]
        results: list[str | None] = []
        for words, found, expected in cases:
            try:
                results.append(answer(copy.deepcopy(found), list(NEEDED)))
            except (IndexError, ValueError) as error:
                if expected is None:
                    raise Hint(f"Where {words}, it raises {type(error).__name__}: return None there.") from None
                if not results or (isinstance(error, ValueError) and "literal" not in str(error)):
                    raise
                raise Hint("There are folders that are not checkpoint-N: skip them.") from None
        right = [expected for _, _, expected in cases]
        if results == right:
            return
        if all(result is None for result in results):
            raise Hint("It returns None in every case; return the name of the folder.")
        if any(isinstance(result, int) for result in results):
            raise Hint("It returns a number; return the name of the folder, such as 'checkpoint-12'.")
        if results[0] == "checkpoint-9":
            raise Hint("It sorts the names as text, in which 'checkpoint-9' comes after 'checkpoint-12'.")
        if results[0] == "checkpoint-3":
            raise Hint("It takes the oldest: the newest has the highest number.")
        if results[1:4] == ["checkpoint-12"] * 3:
            raise Hint("It takes the highest number, whatever was written of it, as the Trainer does.")
        if results[1:4] == [None] * 3:
            raise Hint("It gives up when the newest is broken: go on to the one before.")
        if results[1:4] == ["checkpoint-12", "checkpoint-9", "checkpoint-9"]:
            raise Hint("It asks whether a file is there, and not whether it reaches its end.")
        if results[1:3] == ["checkpoint-9", "checkpoint-12"]:
            raise Hint("It looks at the files that are there, and does not notice that a needed one is missing.")
        if results[1:4] == ["checkpoint-12", "checkpoint-12", "checkpoint-9"]:
            raise Hint("One file is not enough: a run needs all of `needed` to resume.")
        if results[4] == "checkpoint-9":
            raise Hint("It passes over a checkpoint because of its README.md, which is not needed.")
        if results[5] == "checkpoint-best":
            raise Hint("checkpoint-best has no number: only checkpoint-N is the Trainer's.")
        if results[6] in ("12", "checkpoint-12"):
            raise Hint("A folder called 12 is none of the Trainer's: match the whole name checkpoint-N.")
        for (words, _, expected), result in zip(cases, results, strict=True):
            if result != expected:
                raise Hint(f"Where {words}, the answer is {expected!r}, and it says {result!r}.")

    check(answer, test, "The newest checkpoint from which nothing is missing; None means start again.")


def early_stopping(answer: Callable[[list[float], int], tuple[int, int]]) -> None:
    """Check `early_stopping(losses, patience)`: patience counts since the best so far, and a tie is not better."""

    def test() -> None:
        cases = [
            ([3.0, 2.0, 2.5, 2.4, 1.0, 1.2, 1.1, 1.3, 0.5], 3),
            ([3.0, 2.0, 2.2, 2.1, 1.9, 2.0, 1.95, 1.9, 2.5, 0.1], 3),
            ([2.0, 1.0, 1.5, 0.9, 1.0, 0.8], 2),
            ([1.0, 1.1, 0.2], 1),
            ([2.0, 0.5, 1.0, 1.1, 0.9, 0.8], 3),
        ]
        results = [answer(list(losses), patience) for losses, patience in cases]
        if None in results:
            raise Hint("It returns None; return two numbers, also for a run that reaches its end.")
        if not all(isinstance(result, tuple | list) and len(result) == 2 for result in results):
            raise Hint("Return two numbers: the evaluation at which it stops, and that of the best model.")
        pairs = [tuple(result) for result in results]
        right = [_stopped(losses, patience) for losses, patience in cases]
        if pairs == right:
            return
        mistakes: list[tuple[str, dict[str, Any]]] = [
            ("It stops one evaluation late: with patience 3 the third that is not better ends the run.", {"late": 1}),
            ("It stops one evaluation early.", {"late": -1}),
            ("It compares with the evaluation before; compare with the best so far.", {"previous": True}),
            ("It never starts counting again: a new best sets the count back to 0.", {"reset": False}),
            ("An equal loss is not better, and does not set the count back.", {"tie": True}),
        ]
        for hint, mistake in mistakes:
            if pairs == [_stopped(losses, patience, **mistake) for losses, patience in cases]:
                raise Hint(hint)
        if pairs == [(stop - 1, best - 1) for stop, best in right]:
            raise Hint("It counts from 0; count the evaluations from 1.")
        if pairs == [(best, stop) for stop, best in right]:
            raise Hint("The two numbers are swapped: first where it stops, then the best.")
        if pairs == [(stop, stop) for stop, _ in right]:
            raise Hint("The best model is not the last one: patience has passed since then.")
        lowest = [1 + losses.index(min(losses)) for losses, _ in cases]
        counted = [best + patience for best, (_, patience) in zip(lowest, cases, strict=True)]
        within = [min(stop, len(losses)) for stop, (losses, _) in zip(counted, cases, strict=True)]
        for stops in ([stop for stop, _ in right], counted, within):
            if pairs == list(zip(stops, lowest, strict=True)):
                raise Hint("It has looked ahead: the best is to be found among the evaluations up to the stop.")
        for (losses, patience), expected, pair in zip(cases, right, pairs, strict=True):
            if pair != expected:
                raise Hint(f"For {losses} and patience {patience} it is {expected}, and it says {pair}.")

    check(answer, test, "Patience counts the evaluations since the best; that one is loaded at the end.")


def diverged(answer: Callable[[dict[str, float]], bool]) -> None:
    """Check `diverged(logs)`: any number that is not finite, whichever entry it is in."""

    def test() -> None:
        cases = [
            ({"loss": 2.1, "grad_norm": 0.8, "learning_rate": 1e-3}, False),
            ({"loss": 0.0, "grad_norm": 0.3, "learning_rate": 1e-3}, False),
            ({"loss": 55.0, "grad_norm": 900.0, "learning_rate": 1e-3}, False),
            ({"eval_loss": 1.2, "epoch": 1.0}, False),
            ({"train_loss": 1.4, "train_runtime": 8.1, "total_flos": 0.0}, False),
            ({"loss": 0.0, "grad_norm": NAN, "learning_rate": 1e-3}, True),
            ({"loss": NAN, "grad_norm": NAN, "learning_rate": 1e-3}, True),
            ({"loss": 1.9, "grad_norm": INFINITY, "learning_rate": 1e-3}, True),
            ({"eval_loss": NAN, "epoch": 1.0}, True),
        ]
        try:
            results = [answer(dict(logs)) for logs, _ in cases]
        except KeyError as error:
            raise Hint(f"Not every entry has {error}: an evaluation logs eval_loss and no grad_norm.") from None
        if None in results:
            raise Hint("It returns None for an entry; return True or False.")
        says = [bool(result) for result in results]
        healthy, broken = says[:5], says[5:]
        if not any(says):
            raise Hint("It always says False. NaN equals nothing, not even itself: use math.isnan or math.isfinite.")
        if healthy == [True] * 5 and not any(broken):
            raise Hint("It is the wrong way round: True means that the run has diverged.")
        if says[1]:
            raise Hint("A loss of 0.0 alone is no proof: a run that has learned its rows by heart logs 0.0 too.")
        if says[2]:
            raise Hint("A large loss or gradient is finite, and training may recover: look for what is not finite.")
        if not broken[0]:
            raise Hint("It trusts the loss, which the Trainer logs as 0.0 when it is NaN: look at grad_norm as well.")
        if not broken[2]:
            raise Hint("It finds NaN and not infinity: use math.isfinite.")
        if not broken[3]:
            raise Hint("It does not look at eval_loss, which can be NaN too.")
        for (logs, expected), result in zip(cases, says, strict=True):
            if result != expected:
                raise Hint(f"For {logs} it should be {expected}.")

    check(answer, test, "Whichever entry holds it, a number that is not finite ends a run.")


def _twelve(files: dict[str, bool]) -> Found:
    """Three folders as a killed run leaves them: the newest, checkpoint-12, has the given files."""
    return {"checkpoint-9": dict.fromkeys(NEEDED, True), "checkpoint-12": files, "runs": {}}


def _stopped(
    losses: Sequence[float], patience: int, late: int = 0, previous: bool = False, reset: bool = True, tie: bool = False
) -> tuple[int, int]:
    """Where early stopping ends and its best evaluation, both from 1; each option is a mistake."""
    best, count = 0, 0
    for i, loss in enumerate(losses[1:], start=1):
        reference = losses[i - 1] if previous else losses[best]
        if loss < reference or (tie and loss == reference):
            count = count if not reset else 0
        else:
            count += 1
        best = i if loss < losses[best] else best
        if count >= patience + late:
            return i + 1, best + 1
    return len(losses), best + 1
