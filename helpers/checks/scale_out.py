"""The checks of notebook 11_scale_out.

The right answers come from the libraries where they have one: `torch.chunk` for the rows, a simulation of the dealing
and of the ring for the counts. Each wrong answer is compared with what the likely mistakes give.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from helpers.checks.base import Hint, check, compare

import torch


def updates_in_an_epoch(answer: Callable[[int, int, int, int], tuple[int, int]]) -> None:
    """Check `updates_in_an_epoch(rows, micro_batch, steps, processes)`: the updates, and the rows filled in."""

    def test() -> None:
        cases = [
            (100, 4, 2, 3),
            (64, 4, 2, 4),
            (41, 2, 4, 4),
            (1000, 8, 3, 8),
            (17, 1, 2, 2),
            (50, 3, 2, 2),
            (40, 4, 2, 3),
        ]
        pairs = [_pair(answer(*case), "two whole numbers, the updates and the rows") for case in cases]
        for number in (value for pair in pairs for value in pair):
            if isinstance(number, bool) or number != int(number):
                raise Hint(f"It returns {number!r}: both are whole numbers. Round up where something is left over.")
        updates, filled = (_column(pairs, i) for i in (0, 1))
        n, b, s, p = torch.tensor(cases, dtype=torch.float64).T
        rounds = (n / (b * p)).ceil()
        mistakes = [
            ((n / b / s).ceil(), "processes has no effect: each of them takes only its share of the micro-batches."),
            (((n / b).ceil() / s).ceil(), "processes has no effect: each takes only its share of the micro-batches."),
            (rounds, "steps has no effect: one update takes that many rounds."),
            ((n // (b * p)) // s, "It drops what is left over: an incomplete round is filled up, and the last update "
             "may have fewer rounds."),
            ((n / (b * p)).floor() / s, "It drops an incomplete round. It is filled up and counts."),
            ((rounds / s).floor(), "It drops the last update where it has fewer rounds: round up here too."),
            ((((n / (b * p)).floor()) / s).ceil(), "It drops an incomplete round. It is filled up and counts."),
            ((n / (b * p * s)).floor(), "It rounds down: what is left over makes one more update."),
            ((n / p / b).floor(), "steps has no effect: one update takes that many rounds."),
            (rounds * p / s, "It counts the micro-batches of all processes: they take a round at the same time."),
            ((rounds * p / s).ceil(), "It counts the micro-batches of all processes: they take theirs at one time."),
        ]  # fmt: skip
        right = (rounds / s).ceil()
        i = _first_wrong(updates, right)
        otherwise = f"For {_named(cases[i])} there are {int(right[i])} updates; it says {pairs[i][0]}."
        compare(updates, right, mistakes, otherwise)
        right = rounds * b * p - n
        whole = (rounds / s).ceil() * s
        mistakes = [
            (whole * b * p - n, "It fills up the last update. Only the last round is filled up: an update may have "
             "fewer rounds than steps."),
            ((n / b).ceil() * b - n, "It fills up the last micro-batch only. All processes take the same number of "
             "full micro-batches."),
            (n % (b * p), "These are the rows in the incomplete round. How many are missing there?"),
            (rounds * b * p, "These are all rows that are used, the data set's included."),
            (-right, "It has the wrong sign: filled in are the rows used minus the rows of the data set."),
            (b * p - n % (b * p), "Where the rows come out even, nothing is filled in."),
            (torch.zeros_like(n), "Rows are filled in where the last round is incomplete."),
        ]  # fmt: skip
        i = _first_wrong(filled, right)
        otherwise = f"For {_named(cases[i])} {int(right[i])} rows are filled in, and it says {pairs[i][1]}."
        compare(filled, right, mistakes, otherwise)

    check(answer, test, "The Trainer counts so too. Set warm-up and the number of epochs by it.")


def loss_factors(answer: Callable[[list[int]], list[float]]) -> None:
    """Check `loss_factors(tokens)`: the number of processes, times the tokens of each, by the tokens of all."""

    def test() -> None:
        for tokens in ([30, 10], [7, 0, 21, 4], [5], [12, 12, 12]):
            given = list(tokens)
            try:
                result = answer(given)
            except ZeroDivisionError:
                raise Hint("It divides by zero where a process has no label token: its factor is 0.") from None
            if given != tokens:
                raise Hint("It changes the list that it is given: make a new one.")
            if not isinstance(result, Sequence | torch.Tensor):
                raise Hint(f"It returns {type(result).__name__}; return a list with a number for each process.")
            if len(result) != len(tokens):
                raise Hint(f"For {len(tokens)} processes it returns {len(result)} numbers: one for each.")
            n = torch.tensor(tokens, dtype=torch.float64)
            w, total = len(tokens), sum(tokens)
            mistakes = [
                (n / total, "The factors add up to 1, and DDP divides by the number of processes once more."),
                (torch.ones(w), "All factors are 1: that is the mean of means."),
                (torch.full((w,), float(w)), "Each mean gets the same factor: that is still the mean of means."),
                (n, "These undo the mean of each process. Divide by the tokens of all, and undo DDP's division."),
                (n * w, "The division by the tokens of all processes is missing."),
                (total / (w * n), "It is upside down: a process with more tokens must count for more."),
                (total / n, "It is upside down: a process with more tokens must count for more."),
                (n / total / w, "DDP divides by the number of processes already: multiply by it to undo that."),
                (torch.full((w,), w / total), "That factor is for the sum of the token losses. Here each process has "
                 "the mean of its own: what makes the sum of it?"),
                (torch.full((w,), 1 / total), "That is for sums of token losses, and DDP's division is not undone."),
            ]  # fmt: skip
            right = w * n / total
            otherwise = f"For {tokens} the factors are {[round(f, 2) for f in right.tolist()]}, and not {list(result)}."
            compare(torch.as_tensor(result).detach().double(), right, mistakes, otherwise)

    check(answer, test, "Mean times tokens is the sum; the number of processes undoes DDP's division.")


def ring(answer: Callable[[float, int, float], tuple[float, float]]) -> None:
    """Check `ring(size, processes, bytes_per_second)`: 2 (n - 1) / n of the size, and the seconds for it."""

    def test() -> None:
        cases = [(1200.0, 4, 50.0), (1e6, 2, 1e3), (1e9, 64, 3e9), (500.0, 1, 10.0), (9e5, 3, 7e3)]
        pairs = [_pair(answer(*case), "two numbers, the bytes and the seconds") for case in cases]
        sent, seconds = (_column(pairs, i) for i in (0, 1))
        s, n, rate = torch.tensor(cases, dtype=torch.float64).T
        right = torch.tensor([_simulated_ring(int(p)) for p in n.tolist()], dtype=torch.float64) * s / n
        mistakes = [
            ((n - 1) * s / n, "That is one half of it: after the sums are made, they go round as well."),
            (2 * s, "That is where it tends to with many processes. A piece need not come back to where it began."),
            (2 * (n - 1) * s, "In each round a process sends one piece, and not all of the gradients."),
            ((n - 1) * s, "That is for sending everything to everyone. In a ring a process sends one piece a round."),
            (n * s, "That is for sending everything to everyone. In a ring a process sends one piece a round."),
            (s, "Each process sends several pieces, in two halves of n - 1 rounds."),
            (2 * s / n, "A process sends a piece in each round. How many rounds are there in a half?"),
        ]
        i = _first_wrong(sent, right)
        who = f"{cases[i][1]} processes with {cases[i][0]:g} bytes"
        otherwise = f"{who} send {right[i]:g} bytes each, and it says {float(sent[i]):g}."
        compare(sent, right, mistakes, otherwise)
        mistakes = [
            (s / rate, "The seconds are those for the whole gradients. Divide the bytes that are sent."),
            (right * rate, "It multiplies by the speed: seconds are bytes divided by bytes a second."),
            (rate / right.clamp(min=1), "It is upside down: seconds are bytes divided by bytes a second."),
            (n * right / rate, "All processes send at the same time: the time is that of one."),
            (2 * right / rate, "A process sends while it receives: the time is that of sending."),
        ]
        i = _first_wrong(seconds, right / rate)
        where = f"With {cases[i][1]} processes, {cases[i][0]:g} bytes and {rate[i]:g} bytes a second"
        otherwise = f"{where} it takes {right[i] / rate[i]:g} seconds, and it says {float(seconds[i]):g}."
        compare(seconds, right / rate, mistakes, otherwise)

    check(answer, test, "Nearly twice the size, however many take part. That is why rings scale.")


def rows_of(answer: Callable[[int, int, int], tuple[int, int]]) -> None:
    """Check `rows_of(rank, rows, processes)`: the rows of `torch.chunk(whole, processes)[rank]`."""

    def test() -> None:
        for rows, processes in ((8, 4), (10, 4), (8, 3), (8, 5), (3, 8), (9, 6), (1, 2), (7, 1)):
            pieces = torch.chunk(torch.arange(rows), processes)
            found, right = [], []
            for rank in range(processes):
                start, end = _pair(answer(rank, rows, processes), "the first row and the row after the last")
                if any(isinstance(number, bool) or number != int(number) for number in (start, end)):
                    raise Hint(f"It returns {(start, end)}: rows are counted in whole numbers.")
                found.append((int(start), int(end)))
                piece = pieces[rank].tolist() if rank < len(pieces) else []
                right.append((piece[0], piece[-1] + 1) if piece else None)
            where = f"of {rows} rows in {processes} processes"
            _rows_hint(found, right, rows, processes, where)

    check(answer, test, "With 8 rows and 5 processes the last holds none, and waits with the rest all the same.")


def _rows_hint(
    found: list[tuple[int, int]], right: list[tuple[int, int] | None], rows: int, processes: int, where: str
) -> None:
    def agrees(other: Sequence[tuple[int, int] | None]) -> bool:
        return all(f == o if o is not None else f[0] == f[1] for f, o in zip(found, other, strict=True))

    if agrees(right):
        return
    size, small = math.ceil(rows / processes), rows // processes
    ranks = range(processes)
    even = [rank * small + min(rank, rows % processes) for rank in range(processes + 1)]
    mistakes: list[tuple[Sequence[tuple[int, int] | None], str]] = [
        ([(rank * size, (rank + 1) * size) for rank in ranks], f"It goes past the end {where}."),
        ([(rank * size, min((rank + 1) * size, rows)) for rank in ranks], f"It starts past the end {where}: a process "
         "without rows gets two equal numbers."),
        ([(rank * small, (rank + 1) * small) for rank in ranks], f"It leaves rows out {where}: round the size up."),
        ([(rank * small, (rank + 1) * small if rank < processes - 1 else rows) for rank in ranks],
         f"It gives what is left over to the last {where}. The size is rounded up, and the last get less."),
        (list(itertools.pairwise(even)), f"It deals what is left over to the first {where}, one row each, "
         "as numpy.array_split does. torch.chunk makes all pieces as large as the first, while there are rows."),
        ([(piece[0], piece[1] - 1) if piece else None for piece in right], "The second number is the row after the "
         "last, as in a slice."),
        ([(piece[0], piece[1] - piece[0]) if piece else None for piece in right], "The second number is the row after "
         "the last, and not how many there are."),
        ([(piece[0] + 1, piece[1]) if piece else None for piece in right], "Rows are counted from 0."),
    ]  # fmt: skip
    for other, hint in mistakes:
        if agrees(other):
            raise Hint(hint)
    rank = next(i for i, (f, r) in enumerate(zip(found, right, strict=True)) if f != r and (r or f[0] != f[1]))
    raise Hint(f"Process {rank} {where} holds {_said(right[rank])}, and it says {found[rank]}.")


def _said(piece: tuple[int, int] | None) -> str:
    return "none: two equal numbers" if piece is None else str(piece)


def _simulated_ring(processes: int) -> int:
    """Send pieces round until each process has the whole sum; return how many pieces one process has sent."""
    have = [[{rank} for _ in range(processes)] for rank in range(processes)]  # whose gradients are in whose pieces
    sent = 0
    for round_ in range(2 * (processes - 1)):
        for rank, piece in [(rank, (rank - round_) % processes) for rank in range(processes)]:
            have[(rank + 1) % processes][piece] = have[(rank + 1) % processes][piece] | have[rank][piece]
        sent += 1
    assert all(len(piece) == processes for pieces in have for piece in pieces)
    return sent


def _first_wrong(result: torch.Tensor, right: torch.Tensor) -> int:
    """Return the index of the first case where they differ, as `compare` sees it; 0 if there is none."""
    return int((~torch.isclose(result, right, rtol=1e-5)).double().argmax())


def _named(case: tuple[int, int, int, int]) -> str:
    return f"{case[0]} rows, micro-batches of {case[1]}, {case[2]} steps and {case[3]} processes"


def _column(pairs: list[tuple[Any, Any]], index: int) -> torch.Tensor:
    return torch.tensor([float(pair[index]) for pair in pairs], dtype=torch.float64)


def _pair(result: object, what: str) -> tuple[Any, Any]:
    if not (isinstance(result, tuple | list) and len(result) == 2):
        raise Hint(f"It returns {type(result).__name__}; return {what}.")
    for value in result:
        if not isinstance(value, int | float | torch.Tensor):
            raise Hint(f"It returns {type(value).__name__} in the pair; return {what}.")
    return result[0], result[1]
