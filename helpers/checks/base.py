"""An exercise is data: the right answer, cases, and the wrong answers that learners give, each with its hint."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch

Answer = Callable[..., Any]
CORRECT, WRONG, STUB, NOT_RUN = "correct", "Wrong", "Not written", "Check not run"
# The last result of each exercise, in the order of the first calls.
_results: dict[Exercise, str] = {}


class Hint(Exception):
    """A wrong answer; the text names the likely mistake."""


def same(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-8) -> bool:
    """Equal, or for floating numbers equal to a tolerance; in any nesting of tuples, lists and dicts."""

    def alike(x: Any, y: Any) -> bool:
        return same(x, y, rtol, atol)

    if isinstance(a, bool) or isinstance(b, bool):
        return isinstance(a, bool) and isinstance(b, bool) and a == b
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if isinstance(a, int | float) and isinstance(b, int | float):
        return a == b or math.isclose(a, b, rel_tol=rtol, abs_tol=atol) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        a, b = a.detach(), b.detach()
        return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol, atol, equal_nan=True)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.shape == b.shape and np.allclose(a, b, rtol, atol, equal_nan=True)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, torch.nn.Module) and isinstance(b, torch.nn.Module):
        return alike(dict(a.named_parameters()), dict(b.named_parameters()))
    return type(a) is type(b) and (isinstance(a, Exception) or a == b)


@dataclass(eq=False)
class Exercise:
    """One exercise. Calling it with a learner's function prints one line and never raises.

    A wrong answer gets the hint of the first mistake whose results agree with its own on all cases, an error of the
    same type included. Where the result is a tuple, it is enough to agree up to the first part that is wrong.

    Attributes:
        right: the right answer. Its parameters name the arguments where there is no `otherwise`.
        cases: argument tuples. Each call gets a copy, and has to leave it as it is.
        mistakes: hint -> wrong answer, or several of them.
        learned: what a correct answer shows.
        returns: completes "It returns X; return …" where type, dtype or shape is another one.
        raises: completes "The shapes do not fit (…). …" where torch raises RuntimeError.
        otherwise: the hint where no mistake agrees, from the arguments, the answer's result and the right one.
        run: calls an answer on a case, where that takes more than the arguments: `run(answer, *case)` returns what is
            compared, such as what an optimizer has seen.
        agrees: says whether two results are the same.
        further: requirements beyond the cases; each gets the answer and raises Hint.
    """

    right: Answer
    cases: Sequence[tuple[Any, ...]]
    mistakes: Mapping[str, Answer | Sequence[Answer]]
    learned: str
    returns: str = ""
    raises: str = ""
    otherwise: Callable[..., str] | None = None
    run: Callable[..., Any] = lambda answer, *case: answer(*case)
    agrees: Callable[[Any, Any], bool] = same
    further: Sequence[Callable[[Answer], None]] = ()

    def __call__(self, answer: Answer) -> None:
        name, state = getattr(answer, "__name__", "answer"), torch.get_rng_state()
        _results[self] = WRONG  # also while it runs, and if it is interrupted
        try:
            self._compare(answer)
            for requirement in self.further:
                requirement(answer)
        except NotImplementedError:
            _results[self] = STUB
            print(f"{name}: not written yet. Replace `raise NotImplementedError` and run both cells again.")
        except Hint as hint:
            print(f"{name}: not yet. {hint}")
        except Exception as error:
            print(f"{name}: your function raised {type(error).__name__}: {error}")
        else:
            _results[self] = CORRECT
            print(f"{name}: correct. {self.learned}")
        finally:
            torch.set_rng_state(state)

    def _compare(self, answer: Answer) -> None:
        right = [self.run(self.right, *copy.deepcopy(case)) for case in self.cases]
        found = list(map(_plain, (self._result(answer, case) for case in self.cases), right))
        pairs = list(zip(found, right, strict=True))
        optional = any(wanted is None for wanted in right)
        faults = [None if optional and result is None else fault(result, r, self.returns) for result, r in pairs]
        wrong = [i for i, error in enumerate(faults) if error]
        wrong = wrong or [i for i, pair in enumerate(pairs) if not self.agrees(*pair)]
        if not wrong:
            return
        if hint := self._likely(found, right):
            raise Hint(hint)
        first = wrong[0]
        if isinstance(error := faults[first], RuntimeError) and self.raises:
            raise Hint(f"The shapes do not fit ({error}). {self.raises}")
        if error:
            raise error
        raise Hint((self.otherwise or self._values)(*self.cases[first], found[first], right[first]))

    def _result(self, answer: Answer, case: tuple[Any, ...]) -> Any:
        """Return the answer's result on a case, or the error that it raised."""
        given = copy.deepcopy(case)
        try:
            found = self.run(answer, *given)
        except (NotImplementedError, Hint):
            raise
        except Exception as error:
            return error
        for i, (before, after) in enumerate(zip(case, given, strict=True)):
            if not same(before, after):
                names = list(inspect.signature(answer).parameters)
                raise Hint(f"It changes {names[i] if i < len(names) else 'its arguments'} in place: work on a copy.")
        return found

    def _likely(self, found: list[Any], right: list[Any]) -> str | None:
        """Return the hint of the mistake that gives these results, whole or in the first part that is wrong."""
        made: list[tuple[str, list[Any]]] = []
        for hint, answers in self.mistakes.items():
            for mistake in [answers] if callable(answers) else answers:
                results = (self._quietly(mistake, case) for case in self.cases)
                made.append((hint, list(map(_plain, results, right))))
        parts: list[int | None] = [None]
        if all(isinstance(result, tuple) for result in right):
            differs = (i for i in range(len(right[0])) if not self._agree(found, right, i))
            parts += [next(differs, None)]
        return next((hint for i in parts for hint, other in made if self._agree(found, other, i)), None)

    def _agree(self, found: list[Any], other: list[Any], part: int | None) -> bool:
        """Say whether results agree on all cases: whole, or as tuples up to a part."""

        def one(x: Any, y: Any) -> bool:
            if part is None:
                return self.agrees(x, y)
            tuples = isinstance(x, tuple) and isinstance(y, tuple) and part < min(len(x), len(y))
            return tuples and all(map(self.agrees, x[: part + 1], y[: part + 1]))

        return all(map(one, found, other))

    def _quietly(self, answer: Answer, case: tuple[Any, ...]) -> Any:
        try:
            return self.run(answer, *copy.deepcopy(case))
        except Exception as error:
            return error

    def _values(self, *given: Any) -> str:
        names = inspect.signature(self.right).parameters
        arguments = ", ".join(f"{name}={value}" for name, value in zip(names, given[:-2], strict=False))
        line = f"For {arguments} it is {given[-1]}, not {given[-2]}."
        return " ".join(line.split())  # a tensor has several lines


def _plain(found: Any, right: Any) -> Any:
    """Turn what is as good into the right type: a number of NumPy's or torch's, a list for a tuple."""
    array = isinstance(found, np.generic | np.ndarray | torch.Tensor)
    if isinstance(right, int | float) and array and found.ndim == 0:
        return found.item()
    if isinstance(right, list) and array and found.ndim:
        found = found.tolist()
    if isinstance(right, tuple | list) and isinstance(found, tuple | list) and len(found) == len(right):
        return type(right)(map(_plain, found, right))
    if isinstance(right, dict) and isinstance(found, dict):
        return {key: _plain(value, right.get(key)) for key, value in found.items()}
    return found


def fault(found: Any, right: Any, returns: str) -> Exception | None:
    """Say what is wrong with a result before its value is looked at: an error, its type, dtype, shape, or NaN."""
    if isinstance(found, Exception) or right is None:
        return found if isinstance(found, Exception) else None
    wanted: Any = (int, float) if isinstance(right, float) else type(right)
    if not isinstance(found, wanted) or isinstance(found, bool) != isinstance(right, bool):
        kind = "None" if found is None else type(found).__name__
        return Hint(f"It returns {kind}; return {returns or type(right).__name__}.")
    if isinstance(right, tuple):
        if len(found) != len(right):
            return Hint(f"It returns {len(found)} values; return {returns}.")
        return next(filter(None, (fault(x, y, returns) for x, y in zip(found, right, strict=True))), None)
    if isinstance(right, torch.Tensor):
        if found.shape != right.shape and (found.ndim, right.ndim) != (1, 1):  # of vectors the values say more
            return Hint(f"It returns the shape {tuple(found.shape)}, expected {tuple(right.shape)}; return {returns}.")
        if found.dtype != right.dtype and not (found.is_floating_point() and right.is_floating_point()):
            return Hint(f"It returns {found.dtype}, expected {right.dtype}; return {returns}.")
    if isinstance(right, torch.Tensor | float):
        finite, should_be = (bool(torch.isfinite(torch.as_tensor(x)).all()) for x in (found, right))
        if should_be and not finite:
            return Hint("Its result holds inf or NaN.")
    return None


def progress(checks: ModuleType) -> None:
    """Print in one line which exercises of a notebook are solved, by each check's last result in this kernel.

    Args:
        checks: the notebook's module of checks. Each of its exercises is counted, also those not yet checked.
    """
    exercises = {value: name for name, value in vars(checks).items() if isinstance(value, Exercise)}
    in_order = [key for key in _results if key in exercises] + [key for key in exercises if key not in _results]
    found = {exercises[key]: _results.get(key, NOT_RUN) for key in in_order}
    right = sum(result == CORRECT for result in found.values())
    line = f"Exercises: {right} of {len(found)} correct."
    for result in (WRONG, STUB, NOT_RUN):
        if names := [name for name, last in found.items() if last == result]:
            line += f" {result}: {', '.join(names)}."
    print(line)
