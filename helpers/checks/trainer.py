"""The exercises of notebook 05_trainer: a right answer, and the likely wrong ones, each with its hint."""

from __future__ import annotations

import copy
import math
import re

from helpers.checks.base import Answer, Exercise, Hint
from helpers.data import IGNORE_INDEX

import numpy as np

Files = dict[str, bool]  # file -> whether it reaches its end
NEEDED = ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
NAN = float("nan")


def _all(files: Files, needed: list[str]) -> bool:
    return all(files.get(file) for file in needed)


def _resume(whole: Answer = _all, pattern: str = r"checkpoint-(\d+)", best: Answer = max) -> Answer:
    """Return an answer that takes the best number of the folders that match and are whole."""

    def function(found: dict[str, Files], needed: list[str]) -> str | None:
        numbers = {match[1]: files for folder, files in found.items() if (match := re.fullmatch(pattern, folder))}
        complete = [number for number, files in numbers.items() if whole(files, needed)]
        return f"checkpoint-{best(complete, key=int)}" if complete else None

    return function


_newest, _highest = _resume(), _resume(lambda files, needed: True)


def _without_match(number: Answer, of_all: bool) -> Answer:
    """Return an answer that reads a number from each name, of all folders or of the complete ones."""

    def function(found: dict[str, Files], needed: list[str]) -> str | None:
        numbers = {number(name): files for name, files in found.items() if of_all or _all(files, needed)}
        complete = [number for number, files in numbers.items() if _all(files, needed)]
        return f"checkpoint-{max(complete)}" if complete else None

    return function


WHOLE = dict.fromkeys([*NEEDED, "README.md"], True)
NO_RANDOM_STATE = {name: True for name in WHOLE if name != "rng_state.pth"}


def _killed(files: Files) -> dict[str, Files]:
    """Return the folders of a killed run, whose newest, checkpoint-12, has these files."""
    return {"checkpoint-9": dict.fromkeys(NEEDED, True), "checkpoint-12": files, "runs": {}}


FOLDERS: dict[str, dict[str, Files]] = {
    "of three complete ones": {f"checkpoint-{n}": WHOLE for n in (9, 12, 3)},
    "12's optimizer.pt breaks off": _killed(WHOLE | {"optimizer.pt": False}),
    "12 has no rng_state.pth": _killed(NO_RANDOM_STATE),
    "12 has no file at all": _killed({}),
    "12's README.md breaks off": _killed(WHOLE | {"README.md": False}),
    "there is a folder checkpoint-best": _killed(WHOLE) | {"checkpoint-best": WHOLE},
    "there is a folder 12": {"checkpoint-9": WHOLE, "12": WHOLE},
    "no checkpoint is complete": {"checkpoint-9": NO_RANDOM_STATE, "runs": {}},
}
resume_from = Exercise(
    right=_newest,
    cases=[(found, NEEDED) for found in FOLDERS.values()],
    run=lambda answer, *case: answer(*copy.deepcopy(case)),  # which it may change
    mistakes={
        "It returns None in every case; return the name of the folder.": lambda found, needed: None,
        "It returns a number; return the name of the folder, such as 'checkpoint-12'.":
            lambda *case: int(name[11:]) if (name := _newest(*case)) else None,
        "It sorts the names as text, in which 'checkpoint-9' comes after 'checkpoint-12'.":
            _resume(best=lambda numbers, key: max(numbers)),
        "It takes the oldest: the newest has the highest number.": _resume(best=min),
        "It takes the highest number, whatever was written of it, as the Trainer does.": _highest,
        "It gives up when the newest is broken: go on to the one before.": lambda found, needed: (
            name if (name := _highest(found, needed)) and _all(found[name], needed) else None
        ),
        "It asks whether a file is there, and not whether it reaches its end.":
            _resume(lambda files, needed: all(file in files for file in needed)),
        "It looks at the files that are there, and does not notice that a needed one is missing.": [
            _resume(lambda files, needed: all(files.values())),
            _resume(lambda files, needed: all(files.get(file, True) for file in needed))],
        "One file is not enough: a run needs all of `needed` to resume.":
            _resume(lambda files, needed: files.get("trainer_state.json")),
        "It passes over a checkpoint because of its README.md, which is not needed.":
            _resume(lambda files, needed: _all(files, needed) and all(files.values())),
        "checkpoint-best has no number: only checkpoint-N is the Trainer's.": lambda found, needed: (
            "checkpoint-best" if "checkpoint-best" in found else _newest(found, needed)
        ),
        "A folder called 12 is none of the Trainer's: match the whole name checkpoint-N.": [
            _resume(pattern=r"(?:checkpoint-)?(\d+)"),
            lambda found, needed: "12" if "12" in found else _newest(found, needed)],
        "There are folders that are not checkpoint-N: skip them.": [
            _without_match(number, of_all)
            for number in (lambda name: int(name.split("-")[1]), lambda name: int(name.removeprefix("checkpoint-")))
            for of_all in (True, False)
        ],
        "Where no checkpoint is complete, it raises an error: return None there.": [
            lambda *case: sorted(filter(None, [_newest(*case)]))[-1],
            lambda *case: max(filter(None, [_newest(*case)]))],
    },
    returns="the name of a folder, or None",
    otherwise=lambda found, needed, result, right: "Where {}, the answer is {!r}, and it says {!r}.".format(  # noqa: UP032
        next(words for words, case in FOLDERS.items() if case is found), right, result),
    learned="The newest checkpoint from which nothing is missing; None means start again.",
)  # fmt: skip


def _rows() -> tuple[np.ndarray, np.ndarray]:
    """Return logits (4, 9, 4) and labels (4, 9) for which each way of counting gives another number."""
    generator = np.random.default_rng(0)
    labels = np.full((4, 9), IGNORE_INDEX)
    for row, (start, stop) in enumerate([(4, 6), (2, 9), (0, 3), (5, 9)]):  # the third has a label at position 0
        labels[row, start:stop] = generator.integers(0, 4, stop - start)
    predictions = generator.normal(size=(4, 9, 4))
    for row, position in ((0, 3), (1, 1), (1, 4), (1, 6), (3, 4), (2, 1)):
        predictions[row, position, labels[row, position + 1]] += 9
    predictions[2, 3:] = IGNORE_INDEX  # the Trainer fills up shorter batches with -100
    return predictions, labels


def _shifted(count: Answer) -> Answer:
    """Return an answer from what is right and what counts, (rows, tokens - 1) each, and from all labels."""
    return lambda predictions, labels: count(
        predictions[:, :-1].argmax(-1) == labels[:, 1:], labels[:, 1:] != IGNORE_INDEX, labels
    )


def _plain_number(answer: Answer) -> None:
    if not np.isscalar(result := answer(*_rows())):
        raise Hint(f"It returns {type(result).__name__} with one number in it: return float(…) of it.")


token_accuracy = Exercise(
    right=_shifted(lambda hits, counts, labels: float(hits[counts].mean())),
    cases=[_rows()],
    mistakes={
        "Predictions and labels are not shifted: position t predicts t + 1.":
            lambda predictions, labels: (predictions.argmax(-1) == labels)[labels != IGNORE_INDEX].mean(),
        "It divides by all positions, prompt and padding too: count only where the label is not -100.": [
            lambda predictions, labels: (predictions.argmax(-1) == labels).mean(),
            _shifted(lambda hits, counts, labels: hits.mean()),
            _shifted(lambda hits, counts, labels: hits.sum() / labels.size),
            _shifted(lambda hits, counts, labels: (hits | ~counts).mean())],
        "Shifted the wrong way: predictions[:, :-1] belong to labels[:, 1:].": lambda predictions, labels: (
            predictions[:, 1:].argmax(-1) == labels[:, :-1]
        )[labels[:, :-1] != IGNORE_INDEX].mean(),
        "Nothing predicts a row's first token: count the labels after the shift, in labels[:, 1:].":
            _shifted(lambda hits, counts, labels: hits.sum() / (labels != IGNORE_INDEX).sum()),
        "This is the number of right tokens: divide by the number of label tokens.":
            _shifted(lambda hits, counts, labels: float(hits.sum())),
        "This is the mean of the rows' accuracies, in which a token of a short answer counts for more: divide all "
        "right tokens by all label tokens.":
            _shifted(lambda hits, counts, labels: ((hits & counts).sum(1) / counts.sum(1)).mean()),
        "This is the share of rows that are right throughout: count tokens.":
            _shifted(lambda hits, counts, labels: (hits | ~counts).all(1).mean()),
        "This is the share of wrong tokens.": _shifted(lambda hits, counts, labels: 1 - hits[counts].mean()),
    },
    returns="one number from 0 to 1",
    otherwise=lambda predictions, labels, found, right: f"On our rows it should be {right:.4f}, and it is {found:.4f}.",
    further=[_plain_number],
    learned="Shifted by one, masked, and every label token counts the same.",
)  # fmt: skip


def _stopped(late: int = 0, previous: bool = False, reset: bool = True, tie: bool = False) -> Answer:
    """Return an answer (where it stops, the best evaluation), both from 1; each option is a mistake."""

    def function(losses: list[float], patience: int) -> tuple[int, int]:
        best, waited = 0, 0
        for i, loss in enumerate(losses[1:], start=1):
            reference = losses[i - 1 if previous else best]
            better = loss < reference or (tie and loss == reference)
            waited = waited + 1 if not better else 0 if reset else waited
            best = i if loss < losses[best] else best
            if waited >= patience + late:
                return i + 1, best + 1
        return len(losses), best + 1

    return function


def _lowest(losses: list[float]) -> int:
    return 1 + losses.index(min(losses))


early_stopping = Exercise(
    right=_stopped(),
    cases=[([3.0, 2.0, 2.5, 2.4, 1.0, 1.2, 1.1, 1.3, 0.5], 3), ([2.0, 1.0, 1.5, 0.9, 1.0, 0.8], 2),
           ([1.0, 1.1, 0.2], 1), ([3.0, 2.0, 2.2, 2.1, 1.9, 2.0, 1.95, 1.9, 2.5, 0.1], 3),
           ([2.0, 0.5, 1.0, 1.1, 0.9, 0.8], 3)],
    mistakes={
        "It stops one evaluation late: with patience 3 the third that is not better ends the run.": _stopped(late=1),
        "It stops one evaluation early.": _stopped(late=-1),
        "It compares with the evaluation before; compare with the best so far.": _stopped(previous=True),
        "It never starts counting again: a new best sets the count back to 0.": _stopped(reset=False),
        "An equal loss is not better, and does not set the count back.": _stopped(tie=True),
        "It counts from 0; count the evaluations from 1.": lambda *case: tuple(n - 1 for n in _stopped()(*case)),
        "The two numbers are swapped: first where it stops, then the best.": lambda *case: _stopped()(*case)[::-1],
        "The best model is not the last one: patience has passed since then.": lambda *case: _stopped()(*case)[:1] * 2,
        "It has looked ahead: the best is to be found among the evaluations up to the stop.": [
            lambda losses, patience: (_stopped()(losses, patience)[0], _lowest(losses)),
            lambda losses, patience: (_lowest(losses) + patience, _lowest(losses)),
            lambda losses, patience: (min(_lowest(losses) + patience, len(losses)), _lowest(losses))],
    },
    returns="two numbers, also for a run that reaches its end: the evaluation at which it stops, and that of the best "
    "model",
    otherwise=lambda losses, patience, found, right:
        f"For {losses} and patience {patience} it is {right}, and it says {found}.",
    learned="Patience counts the evaluations since the best; that one is loaded at the end.",
)  # fmt: skip


def _any(bad: Answer, *names: str) -> Answer:
    """Return an answer that says whether a number, in these entries or in all, is bad."""
    return lambda logs: any(bad(value) for name, value in logs.items() if not names or name in names)


def _not_finite(value: float) -> bool:
    return not math.isfinite(value)


def _without_get(*names: str) -> Answer:
    return lambda logs: any(_not_finite(logs[name]) for name in names)


diverged = Exercise(
    right=_any(_not_finite),
    cases=[
        ({"loss": loss, "grad_norm": norm, "learning_rate": 1e-3},)
        for loss, norm in ((2.1, 0.8), (0.0, 0.3), (55.0, 900.0), (0.0, NAN), (NAN, NAN), (1.9, math.inf))
    ] + [
        ({"eval_loss": 1.2, "epoch": 1.0},), ({"eval_loss": NAN, "epoch": 1.0},),
        ({"train_loss": 1.4, "train_runtime": 8.1, "total_flos": 0.0},)],
    mistakes={
        "Not every entry has each number: an evaluation logs eval_loss and no grad_norm.": [
            _without_get("loss", "grad_norm"), _without_get("grad_norm", "loss"), _without_get("loss"),
            _without_get("grad_norm")],
        "It always says False. NaN equals nothing, not even itself: use math.isnan or math.isfinite.":
            _any(lambda value: value == NAN),
        "It is the wrong way round: True means that the run has diverged.":
            lambda logs: all(map(math.isfinite, logs.values())),
        "A loss of 0.0 alone is no proof: a run that has learned its rows by heart logs 0.0 too.": [
            lambda logs: logs.get("loss") == 0 or any(map(_not_finite, logs.values())),
            lambda logs: logs.get("loss") == 0],
        "A large loss or gradient is finite, and training may recover: look for what is not finite.":
            _any(lambda value: not abs(value) < 50),
        "It trusts the loss, which the Trainer logs as 0.0 when it is NaN: look at grad_norm as well.": [
            _any(_not_finite, "loss"), _any(_not_finite, "loss", "eval_loss"), _any(math.isnan, "loss")],
        "It finds NaN and not infinity: use math.isfinite.": _any(math.isnan),
        "It does not look at eval_loss, which can be NaN too.": [
            _any(_not_finite, "grad_norm"), _any(_not_finite, "loss", "grad_norm")],
    },
    returns="True or False",
    otherwise=lambda logs, found, right: f"For {logs} it should be {right}.",
    learned="Whichever entry holds it, a number that is not finite ends a run.",
)  # fmt: skip
