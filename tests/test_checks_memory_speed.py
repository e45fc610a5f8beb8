"""The checks of notebook 09: the solution passes, the stub does not, and each mistake gets its hint."""

from functools import partial

from helpers.checks import memory_speed as checks

import pytest
import torch
from exercises import exercise_functions, exercise_tests, said

STUBS, SOLUTIONS = exercise_functions("09_memory_and_speed")
_said = partial(said, checks)


def _nothing(*arguments):
    return None


BYTES = [
    (lambda f, t, b: f * b / 8 + t * 12, "There are four: the weight, its gradient"),
    (lambda f, t, b: f * b / 8 + t * 8, "8 bytes for each trainable parameter"),
    (lambda f, t, b: f * b / 8 + t * 4, "It counts only the weights"),
    (lambda f, t, b: f * b + t * 16, "divide the bits of the frozen parameters by 8"),
    (lambda f, t, b: f * b + t * 128, "This is in bits"),
    (lambda f, t, b: (f + t) * 16, "no state in the optimizer"),
    (lambda f, t, b: f * (b / 8 + 4) + t * 16, "A frozen parameter has no gradient: it takes"),
    (lambda f, t, b: f * b / 8 + 4 * t * b / 8, "in float32, whatever the frozen ones are stored in"),
    (lambda f, t, b: (f + t) * b / 8 + t * 12, "in float32, whatever the frozen ones are stored in"),
    (lambda f, t, b: t * 16, "The frozen parameters are missing"),
    (lambda f, t, b: (f * b / 8 + t * 16) / 1e9, "This is in GB"),
    (lambda f, t, b: (f * b / 8 + t * 16) / 2**30, "This is in GiB"),
    (lambda f, t, b: 7, "in 16 bits and 30,000 trainable ones it is 2,480,000, and it says 7"),
    (lambda f, t, b: torch.tensor(4.0), "It returns Tensor; return a number"),
    (_nothing, "It returns NoneType"),
]


def _flops(base=4, adapter=6, again=lambda f, a: 2 * (f + a), factor=1.0):
    return lambda f, a, tokens, twice: factor * tokens * (base * f + adapter * a + twice * again(f, a))


FLOPS = [
    (_flops(6, 6), "This is full fine-tuning"),
    (_flops(4, 4), "they need all three products, the frozen weights two"),
    (_flops(4, 4, lambda f, a: 0), "the frozen weights two. And with checkpointing"),
    (_flops(6, 4), "changed places"),
    (_flops(2, 6), "must go through the frozen weights"),
    (_flops(4, 0, lambda f, a: 2 * f), "The adapters' own products are missing"),
    (_flops(0, 6, lambda f, a: 2 * a), "The frozen weights are missing"),
    (_flops(again=lambda f, a: 0), "With checkpointing it should be more"),
    (_flops(again=lambda f, a: 2 * f), "the adapters are a part of it"),
    (_flops(again=lambda f, a: 4 * f + 6 * a), "only the forward pass is computed again"),
    (lambda f, a, t, twice: _flops()(f, a, t, not twice), "the wrong way round"),
    (_flops(factor=0.5), "are two operations"),
    (lambda f, a, t, twice: _flops()(f, a, 1, twice), "This is for one token"),
    (lambda f, a, t, twice: 3, "it is 1,236,000,000, and it says 3"),
    (lambda f, a, t, twice: True, "It returns bool"),
    (_nothing, "It returns NoneType"),
]


def _packed(positions=lambda right, rows: right, mask=lambda right, rows: right):
    def function(lengths):
        right_positions, right_mask = SOLUTIONS["packed"](lengths)
        rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        return positions(right_positions, rows), mask(right_mask, rows)

    return function


def _same(rows):
    return rows[:, None] == rows


def _changes_the_list(lengths):
    result = SOLUTIONS["packed"](lengths)
    lengths.clear()
    return result


PACKED = [
    (_packed(lambda p, rows: torch.arange(len(p))), "The positions run on"),
    (_packed(lambda p, rows: p + 1), "start at one"),
    (_packed(lambda p, rows: rows), "the numbers of the rows"),
    (_packed(lambda p, rows: torch.bincount(rows)[rows] - 1 - p), "The positions fall"),
    (_packed(lambda p, rows: torch.zeros_like(p)), "For [3, 1, 4] they are [0, 1, 2, 0, 0, 1, 2, 3], not"),
    (_packed(lambda p, rows: p.float()), "The positions are torch.float32"),
    (_packed(lambda p, rows: p[None]), "the positions have the shape (1, 8), expected (8,)"),
    (_packed(mask=lambda m, rows: torch.ones_like(m).tril()), "sees the rows before its own"),
    (_packed(mask=lambda m, rows: _same(rows)), "sees what comes after it"),
    (_packed(mask=lambda m, rows: m.T), "It is turned around"),
    (_packed(mask=lambda m, rows: m.tril(-1)), "the diagonal is True"),
    (_packed(mask=lambda m, rows: ~m), "It is inverted"),
    (_packed(mask=lambda m, rows: ~_same(rows) & torch.ones_like(m).tril()), "and not the token's own"),
    (_packed(mask=lambda m, rows: torch.ones_like(m)), "Every token sees every other"),
    (_packed(mask=lambda m, rows: torch.eye(len(m), dtype=torch.bool)), "For [3, 1, 4], token 1 may see 0."),
    (_packed(mask=lambda m, rows: m.int()), "The mask is torch.int32"),
    (_packed(mask=lambda m, rows: m[None, None]), "the mask have the shape (1, 1, 8, 8)"),
    (lambda lengths: SOLUTIONS["packed"](lengths)[0], "Return two tensors"),
    (_changes_the_list, "It changes the list of lengths"),
    (_nothing, "Return two tensors"),
]


def _columns(has=lambda labels: labels[:, 1:] != -100, over=lambda has: has.any(dim=0), shift=0):
    return lambda labels: over(has(labels)).nonzero().flatten() + shift


def _from_first_to_last(labels):
    right = _columns()(labels)
    return torch.arange(int(right[0]), int(right[-1]) + 1)


def _changes_the_labels(labels):
    labels[labels == -100] = 0
    return torch.arange(3)


COLUMNS = [
    (_columns(lambda labels: labels != -100), "the labels' own columns"),
    (_columns(shift=1), "one too high"),
    (_columns(shift=2), "shifted the wrong way"),
    (_columns(over=lambda has: has.all(dim=0)), "Some rows are left out"),
    (_from_first_to_last, "Between the first and the last"),
    (lambda labels: torch.arange(labels.shape[1]), "These are all columns."),
    (lambda labels: torch.arange(labels.shape[1] - 1), "all columns but the last"),
    (_columns(lambda labels: labels[:, 1:] > 0), "A label can be 0"),
    (_columns(lambda labels: labels[:, 1:] == -100), "without a label in some row"),
    (lambda labels: (labels[:, 1:] != -100).nonzero()[:, 1], "name it once"),
    (lambda labels: _columns()(labels).flip(0), "in rising order"),
    (lambda labels: torch.tensor([5]), "Labels in the columns [0, 3, 4, 5, 9, 11, 12] need [2, 3, 4, 8, 10, 11]"),
    (lambda labels: (labels[:, 1:] != -100).any(dim=0), "Return the numbers of the columns"),
    (lambda labels: (labels[:, 1:] != -100).any(dim=0).nonzero(), "expected one dimension"),
    (lambda labels: _columns()(labels).int(), "It returns torch.int32"),
    (lambda labels: _columns()(labels).tolist(), "It returns list"),
    (_changes_the_labels, "It changes the labels in place"),
    (_nothing, "It returns NoneType"),
]

WRONG = [
    (name, function, hint)
    for name, rows in (
        ("bytes_without_activations", BYTES),
        ("lora_step_flops", FLOPS),
        ("packed", PACKED),
        ("columns_to_keep", COLUMNS),
    )
    for function, hint in rows
]


test_the_solution_passes_and_the_stub_does_not, test_a_mistake_gets_its_hint = exercise_tests(
    checks, STUBS, SOLUTIONS, WRONG
)


def test_other_ways_to_the_right_answer_pass(capsys):
    def in_a_loop(lengths):
        positions, mask, start = [], torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool), 0
        for length in lengths:
            positions += range(length)
            mask[start : start + length, start : start + length] = torch.ones(length, length).tril().bool()
            start += length
        return torch.tensor(positions), mask

    def by_unique(labels):
        return torch.unique(torch.where(labels != -100)[1][torch.where(labels != -100)[1] > 0]) - 1

    def whole_number(frozen, trainable, bits):
        return int(frozen * bits / 8) + 16 * trainable

    for name, function in (
        ("packed", in_a_loop),
        ("columns_to_keep", by_unique),
        ("bytes_without_activations", whole_number),
    ):
        assert "correct" in _said(capsys, name, function)


@pytest.mark.parametrize("name", SOLUTIONS)
def test_an_error_in_the_answer_is_printed(name, capsys):
    def broken(*arguments):
        raise KeyError("x")

    assert "your function raised KeyError" in _said(capsys, name, broken)
