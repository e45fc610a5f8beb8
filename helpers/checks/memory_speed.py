"""The exercises of notebook 09: a reference answer and the likely wrong ones, each with its hint."""

from __future__ import annotations

from helpers.checks.base import Answer, Exercise

import torch
from torch import Tensor

ONLY_BITS = "A frozen parameter has no gradient: it takes `bits` bits and no more."
FLOAT32 = "The trainable parameters are in float32, whatever the frozen ones are stored in: four bytes a number."
FOUR = "There are four: the weight, its gradient, and the two averages that AdamW keeps."


def _bytes(trained: Answer) -> Answer:
    """Return an answer in which each trainable parameter takes `trained(bits)` bytes."""
    return lambda frozen, trainable, bits: frozen * bits / 8 + trainable * trained(bits)


bytes_without_activations = Exercise(
    right=_bytes(lambda bits: 16),
    cases=[(1_000_000, 30_000, 16), (5_000_000, 90_000, 4.127), (0, 70_000, 4), (200_000, 800_000, 8)],
    mistakes={
        f"It has 12 bytes for each trainable parameter, three numbers of four bytes. {FOUR}": _bytes(lambda bits: 12),
        f"It has 8 bytes for each trainable parameter, two numbers of four bytes. {FOUR}": _bytes(lambda bits: 8),
        "It counts only the weights. A trainable parameter also has a gradient, and AdamW keeps two averages.":
            _bytes(lambda bits: 4),
        "A byte has 8 bits: divide the bits of the frozen parameters by 8.": lambda f, t, bits: f * bits + 16 * t,
        "This is in bits: divide by 8.": lambda f, t, bits: f * bits + 128 * t,
        "A frozen parameter has no gradient, and no state in the optimizer: it takes `bits` bits and no more.":
            lambda f, t, bits: 16 * (f + t),
        ONLY_BITS: lambda f, t, bits: f * (bits / 8 + 4) + 16 * t,
        FLOAT32: [_bytes(lambda bits: bits / 2), _bytes(lambda bits: bits / 8 + 12)],
        "The frozen parameters are missing: they are in memory too.": lambda f, t, bits: 16 * t,
        "This is in GB; return bytes.": lambda f, t, bits: (f * bits / 8 + 16 * t) / 1e9,
        "This is in GiB; return bytes.": lambda f, t, bits: (f * bits / 8 + 16 * t) / 2**30,
    },
    returns="a number of bytes",
    otherwise=lambda f, t, bits, found, right: (
        f"For {f:,} frozen parameters in {bits} bits and {t:,} trainable ones it "
        f"is {right:,.0f}, and it says {found:,.0f}."
    ),
    learned="16 bytes for what is trained, and a fraction of a byte up to two for what is not.",
)  # fmt: skip


def _flops(base: int = 4, adapter: int = 6, again: Answer = lambda f, a: 2 * (f + a), factor: float = 1.0) -> Answer:
    return lambda f, a, tokens, twice: factor * tokens * (base * f + adapter * a + twice * again(f, a))


ALL_THREE = "The adapters are trained: they need all three products, the frozen weights two."
lora_step_flops = Exercise(
    right=_flops(),
    cases=[(f, a, t, twice) for twice in (False, True) for f, a, t in ((1_000_000, 20_000, 300), (70_000, 50_000, 17))],
    mistakes={
        "This is full fine-tuning: frozen weights need no gradient of their own, so one of the three products is left "
        "out.": _flops(6, 6),
        ALL_THREE: _flops(4, 4),
        f"{ALL_THREE} And with checkpointing the forward pass is computed twice.": _flops(4, 4, lambda f, a: 0),
        "Frozen and trainable have changed places: it is the frozen weights that need no gradient.": _flops(6, 4),
        "The backward pass must go through the frozen weights as well: their input's gradient is what the adapters "
        "below get theirs from.": _flops(2, 6),
        "The adapters' own products are missing.": _flops(4, 0, lambda f, a: 2 * f),
        "The frozen weights are missing: their layers compute too, forward and backward.":
            _flops(0, 6, lambda f, a: 2 * a),
        "With checkpointing it should be more: the forward pass is computed twice.": _flops(again=lambda f, a: 0),
        "With checkpointing the whole layer is computed again, and the adapters are a part of it.":
            _flops(again=lambda f, a: 2 * f),
        "With checkpointing only the forward pass is computed again, not the whole step.":
            _flops(again=lambda f, a: 4 * f + 6 * a),
        "It is the wrong way round: with checkpointing there is more to compute.":
            lambda f, a, t, twice: _flops()(f, a, t, not twice),
        "A multiplication and an addition are two operations: the count is half of what it should be.":
            _flops(factor=0.5),
        "This is for one token: multiply by the number of tokens.": lambda f, a, t, twice: _flops()(f, a, 1, twice),
    },
    returns="a number of operations",
    otherwise=lambda *c: f"For {c[:4]} it is {c[5]:,.0f}, and it says {c[4]:,.0f}.",
    learned="Four for each frozen weight and token, six for each of the adapters', and two more to recompute.",
)  # fmt: skip


def _pack(positions: Answer = lambda p, rows: p, mask: Answer = lambda same, past: same & past) -> Answer:
    def function(lengths: list[int]) -> tuple[Tensor, Tensor]:
        rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        same = rows[:, None] == rows
        counted = torch.cat([torch.arange(length) for length in lengths])
        return positions(counted, rows), mask(same, torch.ones_like(same).tril())

    return function


def _first_difference(lengths: list[int], found: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> str:
    if not torch.equal(found[0], right[0]):
        return f"For {lengths} they are {right[0].tolist()}, not {found[0].tolist()}."
    i, j = (found[1] != right[1]).nonzero()[0].tolist()
    return f"For {lengths}, token {i} {'may' if right[1][i, j] else 'may not'} see {j}."


packed = Exercise(
    right=_pack(),
    cases=[([3, 1, 4],), ([2, 5],), ([6],)],
    mistakes={
        "The positions run on: they start again at zero in each row.": _pack(lambda p, rows: torch.arange(len(p))),
        "The positions start at one; the first token of a row has position zero.": _pack(lambda p, rows: p + 1),
        "These are the numbers of the rows. The position of a token is counted within its row.":
            _pack(lambda p, rows: rows),
        "The positions fall: they rise from zero.": _pack(lambda p, rows: torch.bincount(rows)[rows] - 1 - p),
        "A token sees the rows before its own: allow only what is in the same row.": _pack(
            mask=lambda same, past: past
        ),
        "A token sees what comes after it: within a row, j may not be above i.": _pack(mask=lambda same, past: same),
        "It is turned around: mask[i, j] is about token i looking back at token j.":
            _pack(mask=lambda same, past: same & past.T),
        "A token may see itself: the diagonal is True.": _pack(mask=lambda same, past: same & past.tril(-1)),
        "It is inverted: True says that a token may be seen.": _pack(mask=lambda same, past: ~(same & past)),
        "It allows the rows before and not the token's own.": _pack(mask=lambda same, past: ~same & past),
        "Every token sees every other: allow only the past, and only within a row.":
            _pack(mask=lambda same, past: torch.ones_like(past)),
    },
    returns="two tensors, the positions (int64) and the mask (bool)",
    otherwise=_first_difference,
    learned="Each row begins at zero and sees itself and what came before, as if it were alone.",
)  # fmt: skip

_labels = torch.full((3, 14), -100)
_labels[0, [3, 4, 9]], _labels[1, [4, 5, 9]], _labels[2, [9, 11, 12]] = 7, 8, 0  # 0 is a token as well
_labels[1, 0] = 5  # nothing predicts the first token


def _columns(
    has: Answer = lambda labels: labels[:, 1:] != -100, over: Answer = lambda has: has.any(dim=0), shift: int = 0
) -> Answer:
    return lambda labels: over(has(labels)).nonzero().flatten() + shift


def _between(labels: Tensor) -> Tensor:
    right = _columns()(labels)
    return torch.arange(int(right[0]), int(right[-1]) + 1)


columns_to_keep = Exercise(
    right=_columns(),
    cases=[(_labels,), (_labels[1:, :11],)],
    mistakes={
        "These are the labels' own columns. A label is predicted one before it.": _columns(lambda y: y != -100),
        "It is one too high: a label at t + 1 is predicted at t.": _columns(shift=1),
        "It is shifted the wrong way: a label at t + 1 is predicted at t.": _columns(shift=2),
        "Some rows are left out: keep a column if any row needs it.": _columns(over=lambda has: has.all(dim=0)),
        "Between the first and the last column some are not needed.": _between,
        "These are all columns.": lambda y: torch.arange(y.shape[1]),
        "These are all columns but the last.": lambda y: torch.arange(y.shape[1] - 1),
        "A label can be 0, which is a token like any other: only -100 means that there is none.":
            _columns(lambda y: y[:, 1:] > 0),
        "These are the columns without a label in some row.": _columns(lambda y: y[:, 1:] == -100),
        "A column comes up once for each row: name it once.": lambda y: (y[:, 1:] != -100).nonzero()[:, 1],
        "The columns should be in rising order, each once.": lambda y: _columns()(y).flip(0),
        "This says for each column yes or no. Return the numbers of the columns: nonzero gives them.":
            lambda y: (y[:, 1:] != -100).any(dim=0),
    },
    returns="one number for each column, in one dimension",
    otherwise=lambda labels, found, right: (
        f"Labels in the columns {(labels != -100).any(dim=0).nonzero().flatten().tolist()} need {right.tolist()}."
    ),
    learned="The last column of a label is never among them: nothing is predicted after it.",
)  # fmt: skip
