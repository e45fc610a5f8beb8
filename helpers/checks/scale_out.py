"""The exercises of notebook 11_scale_out: a right answer, and the likely wrong ones, each with its hint."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from helpers.checks.base import Answer, Exercise

import torch

ceil = math.ceil


def _rounds(n: int, b: int, p: int) -> int:
    return ceil(n / (b * p))  # in each, every process takes one micro-batch of b rows


def _updates(
    updates: Answer = lambda n, b, s, p: ceil(_rounds(n, b, p) / s),
    filled: Answer = lambda n, b, s, p: _rounds(n, b, p) * b * p - n,
) -> Answer:
    """Return an answer in which one of the two numbers is exchanged."""
    return lambda rows, micro_batch, steps, processes: tuple(
        float(number(rows, micro_batch, steps, processes)) for number in (updates, filled)
    )


def _updates_hint(n: int, b: int, s: int, p: int, found: tuple[float, float], right: tuple[float, float]) -> str:
    if strange := [number for number in found if number != int(number)]:
        return f"It returns {strange[0]!r}: both are whole numbers. Round up where something is left over."
    case = f"For {n} rows, micro-batches of {b}, {s} steps and {p} processes"
    if found[0] != right[0]:
        return f"{case} there are {right[0]:g} updates; it says {found[0]:g}."
    return f"{case} {right[1]:g} rows are filled in, and it says {found[1]:g}."


updates_in_an_epoch = Exercise(
    right=_updates(),
    cases=[(100, 4, 2, 3), (64, 4, 2, 4), (41, 2, 4, 4), (1000, 8, 3, 8), (17, 1, 2, 2), (50, 3, 2, 2), (40, 4, 2, 3)],
    mistakes={
        "processes has no effect: each of them takes only its share of the micro-batches.": [
            _updates(lambda n, b, s, p: ceil(n / b / s)), _updates(lambda n, b, s, p: ceil(ceil(n / b) / s))],
        "steps has no effect: one update takes that many rounds.": [
            _updates(lambda n, b, s, p: _rounds(n, b, p)), _updates(lambda n, b, s, p: n // (b * p))],
        "It drops what is left over: an incomplete round is filled up, and the last update may have fewer rounds.":
            _updates(lambda n, b, s, p: n // (b * p) // s),
        "It drops an incomplete round. It is filled up and counts.": [
            _updates(lambda n, b, s, p: ceil(n // (b * p) / s)), _updates(lambda n, b, s, p: n // (b * p) / s)],
        "It drops the last update where it has fewer rounds: round up here too.":
            _updates(lambda n, b, s, p: _rounds(n, b, p) // s),
        "It counts the micro-batches of all processes: they take a round at the same time.": [
            _updates(lambda n, b, s, p: _rounds(n, b, p) * p / s),
            _updates(lambda n, b, s, p: ceil(_rounds(n, b, p) * p / s))],
        "It returns a fraction: both are whole numbers. Round up where something is left over.": [
            _updates(lambda n, b, s, p: n / (b * p * s)), _updates(lambda n, b, s, p: _rounds(n, b, p) / s)],
        "It fills up the last update. Only the last round is filled up: an update may have fewer rounds than steps.":
            _updates(filled=lambda n, b, s, p: ceil(_rounds(n, b, p) / s) * s * b * p - n),
        "It fills up the last micro-batch only. All processes take the same number of full micro-batches.":
            _updates(filled=lambda n, b, s, p: ceil(n / b) * b - n),
        "These are the rows in the incomplete round. How many are missing there?":
            _updates(filled=lambda n, b, s, p: n % (b * p)),
        "These are all rows that are used, the data set's included.":
            _updates(filled=lambda n, b, s, p: _rounds(n, b, p) * b * p),
        "It has the wrong sign: filled in are the rows used minus the rows of the data set.":
            _updates(filled=lambda n, b, s, p: n - _rounds(n, b, p) * b * p),
        "Where the rows come out even, nothing is filled in.": _updates(filled=lambda n, b, s, p: b * p - n % (b * p)),
        "Rows are filled in where the last round is incomplete.": _updates(filled=lambda n, b, s, p: 0),
    },
    returns="two whole numbers, the updates and the rows",
    otherwise=_updates_hint,
    learned="The Trainer counts so too. Set warm-up and the number of epochs by it.",
)  # fmt: skip


def _each(factor: Answer) -> Answer:
    """Return an answer that makes each factor of a process's tokens, all tokens, and the number of processes."""
    return lambda tokens: [factor(n, sum(tokens), len(tokens)) for n in tokens]


def _factors_hint(tokens: list[int], found: Sequence[float], right: list[float]) -> str:
    if len(found) != len(tokens):
        return f"For {len(tokens)} processes it returns {len(found)} numbers: one for each."
    return f"For {tokens} the factors are {[round(factor, 2) for factor in right]}, and not {list(found)}."


loss_factors = Exercise(
    right=_each(lambda n, total, p: p * n / total),
    cases=[([30, 10],), ([7, 0, 21, 4],), ([5],), ([12, 12, 12],)],
    mistakes={
        "The factors add up to 1, and DDP divides by the number of processes once more.":
            _each(lambda n, total, p: n / total),
        "All factors are 1: that is the mean of means.": _each(lambda n, total, p: 1.0),
        "Each mean gets the same factor: that is still the mean of means.": _each(lambda n, total, p: float(p)),
        "These undo the mean of each process. Divide by the tokens of all, and undo DDP's division.":
            _each(lambda n, total, p: float(n)),
        "The division by the tokens of all processes is missing.": _each(lambda n, total, p: float(n * p)),
        "It is upside down: a process with more tokens must count for more.": [
            _each(lambda n, total, p: total / n / p), _each(lambda n, total, p: total / n),
            _each(lambda n, total, p: total / max(n, 1e-99) / p)],
        "It divides by zero where a process has no label token: its factor is 0.":
            _each(lambda n, total, p: p / (total / n)),
        "DDP divides by the number of processes already: multiply by it to undo that.":
            _each(lambda n, total, p: n / total / p),
        "That factor is for the sum of the token losses. Here each process has the mean of its own: what makes the sum "
        "of it?": _each(lambda n, total, p: p / total),
        "That is for sums of token losses, and DDP's division is not undone.": _each(lambda n, total, p: 1 / total),
    },
    returns="a list with a number for each process",
    otherwise=_factors_hint,
    learned="Mean times tokens is the sum; the number of processes undoes DDP's division.",
)  # fmt: skip


@functools.cache
def _rounds_of_the_ring(processes: int) -> int:
    """Send pieces round until each process has the whole sum; return how many pieces one process has sent."""
    ranks = range(processes)
    have = [[{rank} for _ in ranks] for rank in ranks]  # whose gradients are in whose pieces
    sent = 0
    while any(len(piece) < processes for pieces in have for piece in pieces):
        for rank in ranks:
            piece, after = (rank - sent) % processes, (rank + 1) % processes
            have[after][piece] = have[after][piece] | have[rank][piece]
        sent += 1
    return sent


def _ring(
    sent: Answer = lambda s, n: _rounds_of_the_ring(n) * s / n,
    seconds: Answer = lambda sent, s, n, speed: sent / speed,
) -> Answer:
    """Return an answer in which one of the two numbers is exchanged; the seconds are made of the right bytes."""
    return lambda size, processes, bytes_per_second: (
        float(sent(size, processes)),
        float(seconds(_rounds_of_the_ring(processes) * size / processes, size, processes, bytes_per_second)),
    )


def _ring_hint(s: float, n: int, speed: float, found: tuple[float, float], right: tuple[float, float]) -> str:
    if not math.isclose(found[0], right[0], rel_tol=1e-5):
        return f"{n} processes with {s:g} bytes send {right[0]:g} bytes each, and it says {found[0]:g}."
    return (f"With {n} processes, {s:g} bytes and {speed:g} bytes a second it takes {right[1]:g} seconds, and it says "
            f"{found[1]:g}.")  # fmt: skip


ring = Exercise(
    right=_ring(),
    cases=[(1200.0, 4, 50.0), (1e6, 2, 1e3), (1e9, 64, 3e9), (500.0, 1, 10.0), (9e5, 3, 7e3)],
    mistakes={
        "That is one half of it: after the sums are made, they go round as well.": _ring(lambda s, n: (n - 1) * s / n),
        "That is where it tends to with many processes. A piece need not come back to where it began.":
            _ring(lambda s, n: 2 * s),
        "In each round a process sends one piece, and not all of the gradients.": _ring(lambda s, n: 2 * (n - 1) * s),
        "That is for sending everything to everyone. In a ring a process sends one piece a round.": [
            _ring(lambda s, n: (n - 1) * s), _ring(lambda s, n: n * s)],
        "Each process sends several pieces, in two halves of n - 1 rounds.": _ring(lambda s, n: s),
        "A process sends a piece in each round. How many rounds are there in a half?": _ring(lambda s, n: 2 * s / n),
        "The seconds are those for the whole gradients. Divide the bytes that are sent.":
            _ring(seconds=lambda sent, s, n, speed: s / speed),
        "It multiplies by the speed: seconds are bytes divided by bytes a second.":
            _ring(seconds=lambda sent, s, n, speed: sent * speed),
        "It is upside down: seconds are bytes divided by bytes a second.":
            _ring(seconds=lambda sent, s, n, speed: speed / max(sent, 1)),
        "All processes send at the same time: the time is that of one.":
            _ring(seconds=lambda sent, s, n, speed: n * sent / speed),
        "A process sends while it receives: the time is that of sending.":
            _ring(seconds=lambda sent, s, n, speed: 2 * sent / speed),
    },
    returns="two numbers, the bytes and the seconds",
    otherwise=_ring_hint,
    learned="Nearly twice the size, however many take part. That is why rings scale.",
)  # fmt: skip


def _chunk(rank: int, rows: int, processes: int) -> list[int]:
    piece = [*torch.arange(rows).chunk(processes), *[torch.empty(0)] * processes][rank].tolist()
    return [int(piece[0]), int(piece[-1]) + 1] if piece else [rows, rows]


def _same_rows(found: Any, right: Any) -> bool:
    """Say whether these are the same rows; two equal numbers are none, whichever they are."""
    pairs = isinstance(found, list) and isinstance(right, list) and len(found) == len(right) == 2
    return pairs and (found == right or (found[0] == found[1] and right[0] == right[1]))


def _even(rank: int, rows: int, processes: int) -> list[int]:
    start = rank * (rows // processes) + min(rank, rows % processes)
    return [start, start + rows // processes + (rank < rows % processes)]


def _rows_hint(rank: int, rows: int, processes: int, found: list[float], right: list[int]) -> str:
    if len(found) != 2:
        return f"It returns {len(found)} values; return the first row and the row after the last."
    holds = "none: two equal numbers" if right[0] == right[1] else str(tuple(right))
    return f"Process {rank} of {rows} rows in {processes} processes holds {holds}, and it says {tuple(found)}."


SIZES = ((8, 4), (10, 4), (8, 3), (8, 5), (3, 8), (9, 6), (1, 2), (7, 1))
rows_of = Exercise(
    right=_chunk,
    cases=[(rank, rows, processes) for rows, processes in SIZES for rank in range(processes)],
    agrees=_same_rows,
    mistakes={
        "It goes past the end.": lambda k, n, p: [k * ceil(n / p), (k + 1) * ceil(n / p)],
        "It starts past the end: a process without rows gets two equal numbers.":
            lambda k, n, p: [k * ceil(n / p), min((k + 1) * ceil(n / p), n)],
        "It leaves rows out: round the size up.": lambda k, n, p: [k * (n // p), (k + 1) * (n // p)],
        "It gives what is left over to the last. The size is rounded up, and the last get less.":
            lambda k, n, p: [k * (n // p), (k + 1) * (n // p) if k < p - 1 else n],
        "It deals what is left over to the first, one row each, as numpy.array_split does. torch.chunk makes all "
        "pieces as large as the first, while there are rows.": _even,
        "The second number is the row after the last, as in a slice.":
            lambda k, n, p: [(pair := _chunk(k, n, p))[0], pair[1] - 1],
        "The second number is the row after the last, and not how many there are.":
            lambda k, n, p: [(pair := _chunk(k, n, p))[0], pair[1] - pair[0]],
        "Rows are counted from 0.": lambda k, n, p: [(pair := _chunk(k, n, p))[0] + 1, pair[1]],
        "It returns fractions: rows are counted in whole numbers.": lambda k, n, p: [k * n / p, (k + 1) * n / p],
    },
    returns="the first row and the row after the last",
    otherwise=_rows_hint,
    learned="With 8 rows and 5 processes the last holds none, and waits with the rest all the same.",
)  # fmt: skip
