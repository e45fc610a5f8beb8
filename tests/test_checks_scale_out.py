"""The checks of notebook 11: the solution passes, the stub does not, and each mistake gets its hint."""

import math
from functools import partial

from helpers.checks import scale_out as checks

import pytest
import torch
from exercises import exercise_functions, exercise_tests, said

STUBS, SOLUTIONS = exercise_functions("11_scale_out")
_said = partial(said, checks)
ceil = math.ceil


def _updates(updates=None, filled=None):
    """The right answer with one of its two numbers replaced."""

    def function(rows, micro_batch, steps, processes):
        right = SOLUTIONS["updates_in_an_epoch"](rows, micro_batch, steps, processes)
        return (
            right[0] if updates is None else updates(rows, micro_batch, steps, processes),
            right[1] if filled is None else filled(rows, micro_batch, steps, processes),
        )

    return function


def _ring(sent=None, seconds=None):
    def function(size, processes, bytes_per_second):
        right = SOLUTIONS["ring"](size, processes, bytes_per_second)[0]
        mine = right if sent is None else sent(size, processes)
        return mine, right / bytes_per_second if seconds is None else seconds(size, processes, bytes_per_second, right)

    return function


def _even(rank, rows, processes):
    start = rank * (rows // processes) + min(rank, rows % processes)
    return start, start + rows // processes + (rank < rows % processes)


def _sorted_first(tokens):
    tokens.sort()
    return SOLUTIONS["loss_factors"](tokens)


def _own_rows(change):
    return lambda rank, rows, processes: change(*SOLUTIONS["rows_of"](rank, rows, processes))


def _nothing(*arguments):
    return None


WRONG = [
    ("updates_in_an_epoch", _updates(lambda n, b, s, p: ceil(n / b / s)), "processes has no effect"),
    ("updates_in_an_epoch", _updates(lambda n, b, s, p: ceil(ceil(n / b) / s)), "processes has no effect"),
    ("updates_in_an_epoch", _updates(lambda n, b, s, p: ceil(n / (b * p))), "steps has no effect"),
    ("updates_in_an_epoch", _updates(lambda n, b, s, p: n // (b * p) // s), "It drops what is left over"),
    ("updates_in_an_epoch", _updates(lambda n, b, s, p: ceil((n // (b * p)) / s)), "It drops an incomplete round"),
    ("updates_in_an_epoch", _updates(lambda n, b, s, p: ceil(n / (b * p)) // s), "It drops the last update"),
    ("updates_in_an_epoch", _updates(lambda n, b, s, p: ceil(ceil(n / (b * p)) * p / s)), "of all processes"),
    ("updates_in_an_epoch", _updates(lambda n, b, s, p: n / (b * p * s)), "both are whole numbers"),
    ("updates_in_an_epoch", _updates(lambda n, b, s, p: 3), "3 processes there are 5 updates; it says 3"),
    (
        "updates_in_an_epoch",
        _updates(filled=lambda n, b, s, p: ceil(n / (b * p * s)) * b * p * s - n),
        "an update may have fewer rounds than steps",
    ),
    ("updates_in_an_epoch", _updates(filled=lambda n, b, s, p: ceil(n / b) * b - n), "the last micro-batch only"),
    ("updates_in_an_epoch", _updates(filled=lambda n, b, s, p: n % (b * p)), "How many are missing there"),
    ("updates_in_an_epoch", _updates(filled=lambda n, b, s, p: ceil(n / (b * p)) * b * p), "all rows that are used"),
    ("updates_in_an_epoch", _updates(filled=lambda n, b, s, p: n - ceil(n / (b * p)) * b * p), "the wrong sign"),
    ("updates_in_an_epoch", _updates(filled=lambda n, b, s, p: b * p - n % (b * p)), "the rows come out even"),
    ("updates_in_an_epoch", _updates(filled=lambda n, b, s, p: 0), "Rows are filled in where"),
    ("updates_in_an_epoch", _updates(filled=lambda n, b, s, p: 1), "8 rows are filled in, and it says 1"),
    # Right in the first cases: the first that differs is named.
    ("updates_in_an_epoch", _updates(lambda n, b, s, p: 99 if n == 41 else ceil(ceil(n / b / p) / s)), "For 41 rows"),
    ("updates_in_an_epoch", _updates(filled=lambda n, b, s, p: 99 if n == 17 else -n % (b * p)), "For 17 rows"),
    ("ring", _ring(lambda s, n: 7 if n == 64 else 2 * (n - 1) * s / n), "64 processes with 1e+09 bytes send 1.9"),
    ("ring", _ring(seconds=lambda s, n, rate, sent: 7 if n == 2 else sent / rate), "With 2 processes"),
    ("updates_in_an_epoch", lambda n, b, s, p: 5, "It returns int; return two whole numbers"),
    ("updates_in_an_epoch", _nothing, "It returns NoneType"),
    ("loss_factors", lambda tokens: [n / sum(tokens) for n in tokens], "DDP divides by the number of processes once"),
    ("loss_factors", lambda tokens: [1.0] * len(tokens), "that is the mean of means"),
    ("loss_factors", lambda tokens: [float(len(tokens))] * len(tokens), "still the mean of means"),
    ("loss_factors", lambda tokens: [float(n) for n in tokens], "These undo the mean of each process"),
    ("loss_factors", lambda tokens: [n * len(tokens) for n in tokens], "division by the tokens of all processes"),
    ("loss_factors", lambda tokens: [sum(tokens) / (len(tokens) * max(n, 1e-99)) for n in tokens], "upside down"),
    ("loss_factors", lambda tokens: [n / sum(tokens) / len(tokens) for n in tokens], "multiply by it to undo that"),
    ("loss_factors", lambda tokens: [len(tokens) / sum(tokens)] * len(tokens), "is for the sum of the token losses"),
    ("loss_factors", lambda tokens: [1 / sum(tokens)] * len(tokens), "DDP's division is not undone"),
    ("loss_factors", lambda tokens: [2.0 for _ in tokens[1:]], "it returns 1 numbers"),
    ("loss_factors", lambda tokens: [2 * n / sum(tokens) + 1 for n in tokens], "the factors are [1.5, 0.5]"),
    ("loss_factors", _sorted_first, "It changes the list"),
    ("loss_factors", _nothing, "It returns NoneType; return a list"),
    ("ring", _ring(lambda s, n: (n - 1) * s / n), "That is one half of it"),
    ("ring", _ring(lambda s, n: 2 * s), "need not come back"),
    ("ring", _ring(lambda s, n: 2 * (n - 1) * s), "In each round a process sends one piece"),
    ("ring", _ring(lambda s, n: (n - 1) * s), "sending everything to everyone"),
    ("ring", _ring(lambda s, n: n * s), "sending everything to everyone"),
    ("ring", _ring(lambda s, n: s), "Each process sends several pieces"),
    ("ring", _ring(lambda s, n: 2 * s / n), "How many rounds are there in a half"),
    ("ring", _ring(lambda s, n: s / 3), "4 processes with 1200 bytes send 1800 bytes each, and it says 400"),
    ("ring", _ring(seconds=lambda s, n, rate, sent: s / rate), "Divide the bytes that are sent"),
    ("ring", _ring(seconds=lambda s, n, rate, sent: sent * rate), "It multiplies by the speed"),
    ("ring", _ring(seconds=lambda s, n, rate, sent: rate / max(sent, 1)), "It is upside down"),
    ("ring", _ring(seconds=lambda s, n, rate, sent: n * sent / rate), "All processes send at the same time"),
    ("ring", _ring(seconds=lambda s, n, rate, sent: 2 * sent / rate), "sends while it receives"),
    (
        "ring",
        _ring(seconds=lambda s, n, rate, sent: 7),
        "1200 bytes and 50 bytes a second it takes 36 seconds",
    ),
    ("ring", lambda s, n, rate: 2 * (n - 1) / n * s, "It returns float; return two numbers"),
    ("ring", lambda s, n, rate: ("much", "long"), "It returns str in the pair"),
    ("ring", _nothing, "It returns NoneType"),
    ("rows_of", lambda k, n, p: (k * ceil(n / p), (k + 1) * ceil(n / p)), "It goes past the end"),
    ("rows_of", lambda k, n, p: (k * ceil(n / p), min((k + 1) * ceil(n / p), n)), "It starts past the end"),
    ("rows_of", lambda k, n, p: (k * (n // p), (k + 1) * (n // p)), "It leaves rows out"),
    ("rows_of", lambda k, n, p: (k * (n // p), (k + 1) * (n // p) if k < p - 1 else n), "left over to the last"),
    ("rows_of", _even, "as numpy.array_split does"),
    ("rows_of", _own_rows(lambda a, b: (a, b - 1)), "the row after the last, as in a slice"),
    ("rows_of", _own_rows(lambda a, b: (a, b - a)), "and not how many there are"),
    ("rows_of", _own_rows(lambda a, b: (a + 1, b)), "Rows are counted from 0"),
    ("rows_of", lambda k, n, p: (k * n / p, (k + 1) * n / p), "rows are counted in whole numbers"),
    ("rows_of", lambda k, n, p: (0, n), "Process 0 of 8 rows in 4 processes holds (0, 2), and it says (0, 8)"),
    ("rows_of", lambda k, n, p: list(range(k, n)), "It returns list; return the first row"),
    ("rows_of", _nothing, "It returns NoneType"),
]


test_the_solution_passes_and_the_stub_does_not, test_a_mistake_gets_its_hint = exercise_tests(
    checks, STUBS, SOLUTIONS, WRONG
)


def test_other_right_answers_pass(capsys):
    """Tensors, lists for tuples, whole numbers as floats, another empty range."""

    def updates(rows, micro_batch, steps, processes):
        return [float(number) for number in SOLUTIONS["updates_in_an_epoch"](rows, micro_batch, steps, processes)]

    def factors(tokens):
        n = torch.tensor(tokens, dtype=torch.float32)
        return n / n.mean()

    def rows(rank, rows, processes):
        piece = torch.arange(rows).chunk(processes)[rank:][:1]
        return (int(piece[0][0]), int(piece[0][-1]) + 1) if piece else (0, 0)

    def tensors(size, processes, bytes_per_second):
        sent = torch.tensor(2 * size - 2 * size / processes, dtype=torch.float64)
        return sent, sent / bytes_per_second

    for name, function in (("updates_in_an_epoch", updates), ("loss_factors", factors), ("rows_of", rows)):
        assert "correct" in _said(capsys, name, function)
    assert "correct" in _said(capsys, "ring", tensors)


def test_an_exception_is_shown(capsys):
    printed = _said(capsys, "ring", lambda size, processes, rate: size[0])
    assert "your function raised TypeError" in printed


def test_a_division_by_no_tokens_gets_a_hint(capsys):
    printed = _said(capsys, "loss_factors", lambda tokens: [sum(tokens) / len(tokens) / n for n in tokens])
    assert "is upside down" in printed  # the first case has no zero
    printed = _said(capsys, "loss_factors", lambda tokens: [len(tokens) / (sum(tokens) / n) for n in tokens])
    assert "where a process has no label token" in printed


@pytest.mark.parametrize(("processes", "pieces"), [(1, 0), (2, 2), (4, 6), (64, 126)])
def test_the_ring_is_simulated_to_its_end(processes, pieces):
    assert checks._simulated_ring(processes) == pieces
