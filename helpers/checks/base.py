"""How an exercise is checked: one printed line, never an exception; and a count of what is done."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType

import torch

CORRECT, WRONG, STUB, NOT_RUN = "correct", "Wrong", "Not written", "Check not run"
# The last result of each check, by the check's module and name, in the order of the calls.
_results: dict[str, str] = {}


class Hint(Exception):
    """A wrong answer; the text names the likely mistake."""


def check(function: Callable[..., object], test: Callable[[], None], learned: str) -> None:
    """Run `test` on a learner's function and print one line: not written yet, a hint, or correct.

    The result is remembered for `progress`, under the name of the check that `test` is defined in.

    Args:
        function: the learner's function; its name starts the line.
        test: calls the function and raises `Hint` where the answer is wrong. torch's random state is restored after it.
        learned: a sentence for the correct answer: what it shows.
    """
    name = function.__name__
    exercise = f"{test.__module__}.{test.__qualname__}".partition(".<locals>")[0]
    _results[exercise] = WRONG  # also while it runs, and if it is interrupted
    random_state = torch.get_rng_state()
    try:
        test()
    except NotImplementedError:
        _results[exercise] = STUB
        print(f"{name}: not written yet. Replace `raise NotImplementedError` and run both cells again.")
    except Hint as hint:
        print(f"{name}: not yet. {hint}")
    except Exception as error:
        print(f"{name}: your function raised {type(error).__name__}: {error}")
    else:
        _results[exercise] = CORRECT
        print(f"{name}: correct. {learned}")
    finally:
        torch.set_rng_state(random_state)


def progress(checks: ModuleType) -> None:
    """Print in one line which exercises of a notebook are solved, by each check's last result in this kernel.

    Args:
        checks: the notebook's module of checks. Each of its public functions is an exercise, so those are counted too
            whose check has not been run.
    """
    exercises = {
        f"{checks.__name__}.{name}": name
        for name, value in vars(checks).items()
        if inspect.isfunction(value) and value.__module__ == checks.__name__ and not name.startswith("_")
    }
    in_order = [key for key in _results if key in exercises] + [key for key in exercises if key not in _results]
    found = {exercises[key]: _results.get(key, NOT_RUN) for key in in_order}
    right = sum(result == CORRECT for result in found.values())
    line = f"Exercises: {right} of {len(found)} correct."
    for result in (WRONG, STUB, NOT_RUN):
        if names := [name for name, last in found.items() if last == result]:
            line += f" {result}: {', '.join(names)}."
    print(line)


def compare(
    result: torch.Tensor, right: torch.Tensor, mistakes: list[tuple[torch.Tensor, str]], otherwise: str
) -> None:
    """Raise `Hint` unless a result is right, to a relative 1e-5: with the hint of the mistake whose result this is.

    Args:
        result: the learner's, detached, of a shape that goes with `right`.
        right: the right result.
        mistakes: what likely mistakes give, each with its hint; the first that agrees is named.
        otherwise: the hint where none agrees.
    """

    def agrees(other: torch.Tensor) -> bool:
        return torch.allclose(result.double(), other.double(), rtol=1e-5)

    if not agrees(right):
        raise Hint(next((hint for wrong, hint in mistakes if agrees(wrong)), otherwise))
