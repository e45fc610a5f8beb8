"""The checks of notebook 09_memory_and_speed.

Each compares the answer with the right one and with what the likely mistakes give, on cases so uneven that no two of
them agree by chance.
"""

from __future__ import annotations

from collections.abc import Callable

from helpers.checks.base import Hint, check, compare

import torch
from torch import Tensor


def bytes_without_activations(answer: Callable[[int, int, float], float]) -> None:
    """Check `bytes_without_activations(frozen, trainable, bits)`: frozen * bits / 8 + trainable * 16."""

    def test() -> None:
        cases = [(1_000_000, 30_000, 16), (5_000_000, 90_000, 4.127), (0, 70_000, 4), (200_000, 800_000, 8)]
        result = _numbers([answer(*case) for case in cases], "a number of bytes")
        frozen, trainable, bits = torch.tensor(cases, dtype=torch.float64).T
        weights = frozen * bits / 8
        right = weights + 16 * trainable
        mistakes = [
            (
                weights + 12 * trainable,
                "It has 12 bytes for each trainable parameter, three numbers of four bytes. There are four: the "
                "weight, its gradient, and the two averages that AdamW keeps.",
            ),
            (
                weights + 8 * trainable,
                "It has 8 bytes for each trainable parameter, two numbers of four bytes. There are four: the "
                "weight, its gradient, and the two averages that AdamW keeps.",
            ),
            (
                weights + 4 * trainable,
                "It counts only the weights. A trainable parameter also has a gradient, and AdamW keeps two averages.",
            ),
            (
                frozen * bits + 16 * trainable,
                "A byte has 8 bits: divide the bits of the frozen parameters by 8.",
            ),
            (8 * right, "This is in bits: divide by 8."),
            (
                16 * (frozen + trainable),
                "A frozen parameter has no gradient, and no state in the optimizer: it takes `bits` bits and no more.",
            ),
            (
                weights + 4 * frozen + 16 * trainable,
                "A frozen parameter has no gradient: it takes `bits` bits and no more.",
            ),
            (
                weights + trainable * bits / 2,
                "The trainable parameters are in float32, whatever the frozen ones are stored in: four bytes a number.",
            ),
            (
                weights + trainable * (bits / 8 + 12),
                "The trainable parameters are in float32, whatever the frozen ones are stored in: four bytes a number.",
            ),
            (16 * trainable, "The frozen parameters are missing: they are in memory too."),
            (right / 1e9, "This is in GB; return bytes."),
            (right / 2**30, "This is in GiB; return bytes."),
        ]
        otherwise = (
            f"For {cases[0][0]:,} frozen parameters in {cases[0][2]} bits and {cases[0][1]:,} trainable ones it is "
            f"{right[0]:,.0f}, and it says {result[0]:,.0f}."
        )
        compare(result, right, mistakes, otherwise)

    check(answer, test, "16 bytes for what is trained, and a fraction of a byte up to two for what is not.")


def lora_step_flops(answer: Callable[[int, int, int, bool], float]) -> None:
    """Check `lora_step_flops(frozen, adapters, tokens, checkpointing)`: tokens * (4 F + 6 A), and 2 (F + A) more."""

    def test() -> None:
        sizes = [(1_000_000, 20_000, 300), (70_000, 50_000, 17)]
        cases = [(*size, checkpointing) for checkpointing in (False, True) for size in sizes]
        result = _numbers([answer(*case) for case in cases], "a number of operations")
        f, a, tokens, again = torch.tensor(cases, dtype=torch.float64).T
        right = tokens * (4 * f + 6 * a + again * 2 * (f + a))
        more = again * 2 * (f + a)
        mistakes = [
            (
                tokens * (6 * f + 6 * a + more),
                "This is full fine-tuning: frozen weights need no gradient of their own, so one of the three products "
                "is left out.",
            ),
            (
                tokens * (4 * f + 4 * a + more),
                "The adapters are trained: they need all three products, the frozen weights two.",
            ),
            (
                tokens * (4 * f + 4 * a),
                "The adapters are trained: they need all three products, the frozen weights two. And with "
                "checkpointing the forward pass is computed twice.",
            ),
            (
                tokens * (6 * f + 4 * a + more),
                "Frozen and trainable have changed places: it is the frozen weights that need no gradient.",
            ),
            (
                tokens * (2 * f + 6 * a + more),
                "The backward pass must go through the frozen weights as well: their input's gradient is what the "
                "adapters below get theirs from.",
            ),
            (tokens * (4 * f + again * 2 * f), "The adapters' own products are missing."),
            (
                tokens * (6 * a + again * 2 * a),
                "The frozen weights are missing: their layers compute too, forward and backward.",
            ),
            (tokens * (4 * f + 6 * a), "With checkpointing it should be more: the forward pass is computed twice."),
            (
                tokens * (4 * f + 6 * a + again * 2 * f),
                "With checkpointing the whole layer is computed again, and the adapters are a part of it.",
            ),
            (
                tokens * (4 * f + 6 * a) * (1 + again),
                "With checkpointing only the forward pass is computed again, not the whole step.",
            ),
            (
                tokens * (4 * f + 6 * a + (1 - again) * 2 * (f + a)),
                "It is the wrong way round: with checkpointing there is more to compute.",
            ),
            (right / 2, "A multiplication and an addition are two operations: the count is half of what it should be."),
            (right / tokens, "This is for one token: multiply by the number of tokens."),
        ]
        first = next((i for i in range(4) if not torch.isclose(result[i], right[i], rtol=1e-5)), 0)
        otherwise = f"For {cases[first]} it is {right[first]:,.0f}, and it says {result[first]:,.0f}."
        compare(result, right, mistakes, otherwise)

    check(
        answer, test, "Four for each frozen weight and token, six for each of the adapters', and two more to recompute."
    )


def packed(answer: Callable[[list[int]], tuple[Tensor, Tensor]]) -> None:
    """Check `packed(lengths)`: positions that start again in each row, and a causal mask within rows."""

    def test() -> None:
        for lengths in ([3, 1, 4], [2, 5], [6]):
            given = list(lengths)
            result = answer(given)
            if given != lengths:
                raise Hint("It changes the list of lengths: work on a copy.")
            if not isinstance(result, tuple) or [type(part) for part in result] != [Tensor, Tensor]:
                raise Hint("Return two tensors, the positions and the mask.")
            positions, mask = result
            total = sum(lengths)
            for part, name, shape in ((positions, "positions", (total,)), (mask, "mask", (total, total))):
                if tuple(part.shape) != shape:
                    raise Hint(f"For {lengths} the {name} have the shape {tuple(part.shape)}, expected {shape}.")
            if positions.dtype != torch.int64:
                raise Hint(f"The positions are {positions.dtype}; return int64, as torch.arange gives.")
            _positions(positions, lengths)
            _mask(mask, lengths)

    check(answer, test, "Each row begins at zero and sees itself and what came before, as if it were alone.")


def _positions(positions: Tensor, lengths: list[int]) -> None:
    right = torch.cat([torch.arange(length) for length in lengths])
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mistakes = [
        (torch.arange(len(right)), "The positions run on: they start again at zero in each row."),
        (right + 1, "The positions start at one; the first token of a row has position zero."),
        (numbers, "These are the numbers of the rows. The position of a token is counted within its row."),
        (torch.cat([torch.arange(n).flip(0) for n in lengths]), "The positions fall: they rise from zero."),
    ]
    compare(positions, right, mistakes, f"For {lengths} they are {right.tolist()}, not {positions.tolist()}.")


def _mask(mask: Tensor, lengths: list[int]) -> None:
    if mask.dtype != torch.bool:
        raise Hint(f"The mask is {mask.dtype}; return bool, True where token i may see token j.")
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    same = numbers[:, None] == numbers
    past = torch.ones_like(same).tril()
    mistakes = [
        (past, "A token sees the rows before its own: allow only what is in the same row."),
        (same, "A token sees what comes after it: within a row, j may not be above i."),
        (same & past.T, "It is turned around: mask[i, j] is about token i looking back at token j."),
        (same & past.tril(-1), "A token may see itself: the diagonal is True."),
        (~(same & past), "It is inverted: True says that a token may be seen."),
        (~same & past, "It allows the rows before and not the token's own."),
        (torch.ones_like(same), "Every token sees every other: allow only the past, and only within a row."),
    ]
    right = same & past
    i, j = divmod(int((mask != right).int().argmax()), len(mask))
    word = "may" if right[i, j] else "may not"
    compare(mask.int(), right.int(), [(m.int(), h) for m, h in mistakes], f"For {lengths}, token {i} {word} see {j}.")


def columns_to_keep(answer: Callable[[Tensor], Tensor]) -> None:
    """Check `columns_to_keep(labels)`: columns t with a label at t + 1 in some row."""

    def test() -> None:
        labels = torch.full((3, 14), -100)
        labels[0, [3, 4, 9]], labels[1, [4, 5, 9]], labels[2, [9, 11, 12]] = 7, 8, 0  # 0 is a token as well
        labels[1, 0] = 5  # nothing predicts the first token
        for batch in (labels, labels[1:, :11]):
            given = batch.clone()
            result = answer(given)
            if not torch.equal(given, batch):
                raise Hint("It changes the labels in place: work on a copy.")
            _columns(result, batch)

    check(answer, test, "The last column of a label is never among them: nothing is predicted after it.")


def _columns(result: object, labels: Tensor) -> None:
    if not isinstance(result, Tensor):
        raise Hint(f"It returns {type(result).__name__}; return a tensor of column numbers.")
    if result.dtype == torch.bool:
        raise Hint("This says for each column yes or no. Return the numbers of the columns: nonzero gives them.")
    if result.dtype != torch.int64:
        raise Hint(f"It returns {result.dtype}; column numbers are int64.")
    has = labels != -100
    if result.ndim != 1:
        raise Hint(f"Its shape is {tuple(result.shape)}, expected one dimension: flatten, and one number for a column.")
    right = has[:, 1:].any(dim=0).nonzero().flatten()
    found, wanted = result.tolist(), right.tolist()
    mistakes: list[tuple[Tensor, str]] = [
        (has.any(dim=0).nonzero().flatten(), "These are the labels' own columns. A label is predicted one before it."),
        (right + 1, "It is one too high: a label at t + 1 is predicted at t."),
        (right + 2, "It is shifted the wrong way: a label at t + 1 is predicted at t."),
        (has[:, 1:].all(dim=0).nonzero().flatten(), "Some rows are left out: keep a column if any row needs it."),
        (torch.arange(int(right[0]), int(right[-1]) + 1), "Between the first and the last column some are not needed."),
        (torch.arange(labels.shape[1]), "These are all columns."),
        (torch.arange(labels.shape[1] - 1), "These are all columns but the last."),
        (
            (labels[:, 1:] > 0).any(dim=0).nonzero().flatten(),
            "A label can be 0, which is a token like any other: only -100 means that there is none.",
        ),
        ((~has[:, 1:]).any(dim=0).nonzero().flatten(), "These are the columns without a label in some row."),
        (has[:, 1:].nonzero()[:, 1], "A column comes up once for each row: name it once."),
    ]
    hint = next((hint for wrong, hint in mistakes if found == wrong.tolist()), None)
    if found != wanted and sorted(set(found)) == wanted:
        hint = hint or "The columns should be in rising order, each once."
    if found != wanted:
        raise Hint(hint or f"Labels in the columns {has.any(dim=0).nonzero().flatten().tolist()} need {wanted}.")


def _numbers(results: list[object], what: str) -> Tensor:
    for result in results:
        if isinstance(result, bool) or not isinstance(result, int | float):
            raise Hint(f"It returns {type(result).__name__}; return {what}.")
    return torch.tensor(results, dtype=torch.float64)
