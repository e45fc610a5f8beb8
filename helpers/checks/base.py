"""How an exercise is checked: one printed line, never an exception."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Hint(Exception):
    """A wrong answer; the text names the likely mistake."""


def check(function: Callable[..., object], test: Callable[[], None], learned: str) -> None:
    """Run `test` on a learner's function and print one line: not written yet, a hint, or correct.

    Args:
        function: the learner's function; its name starts the line.
        test: calls the function and raises `Hint` where the answer is wrong. torch's random state is restored after it.
        learned: a sentence for the correct answer: what it shows.
    """
    name = function.__name__
    random_state = torch.get_rng_state()
    try:
        test()
    except NotImplementedError:
        print(f"{name}: not written yet. Replace `raise NotImplementedError` and run both cells again.")
    except Hint as hint:
        print(f"{name}: not yet. {hint}")
    except Exception as error:
        print(f"{name}: your function raised {type(error).__name__}: {error}")
    else:
        print(f"{name}: correct. {learned}")
    finally:
        torch.set_rng_state(random_state)


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
