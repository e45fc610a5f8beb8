"""The checks of notebook 08_qlora.

Each compares the answer with the right one and with what the likely mistakes give, on cases that tell them apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from helpers.checks.base import Hint, check

import torch
from bitsandbytes import functional as bnb

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # code, 8-bit scale of a block of 64, fp32 scale of 256 of these
NAN, INF = float("nan"), float("inf")
LogHistory = list[dict[str, float]]


def training_bytes(answer: Callable[[int, int, int], float]) -> None:
    """Check `training_bytes(linear, other, adapter)`: base, adapter, its gradient and 8-bit AdamW state."""

    def test() -> None:
        cases = [(106_000_000, 28_000_000, 2_400_000), (1_600_000_000, 100_000_000, 9_000_000), (30_000, 400_000, 1)]
        results = [_number(answer(*case)) for case in cases]
        nf4, adapter = NF4_BITS / 8, 10  # weight 4, gradient 4, two moments of 1 byte each
        recipes = {
            "": (nf4, 4, adapter),
            "It counts bits and not bytes for the 4-bit weights: divide by 8.": (NF4_BITS, 4, adapter),
            "4.5 bits are those without double quantization; with it there are 4.127.": (4.5 / 8, 4, adapter),
            "It leaves out the scales of the blocks: a 4-bit weight costs 4.127 bits.": (0.5, 4, adapter),
            "The unquantized weights are in float32 after prepare_model_for_kbit_training: 4 bytes.": (nf4, 2, adapter),
            "Embeddings and norms are not quantized: only the weights of the linear layers are.": (nf4, nf4, adapter),
            "It leaves out the unquantized weights of the base.": (nf4, 0, adapter),
            "It leaves out the adapter's gradient.": (nf4, 4, 6),
            "It leaves out the optimizer's state.": (nf4, 4, 8),
            "It counts the adapter's weights only; they have a gradient and optimizer state too.": (nf4, 4, 4),
            "AdamW keeps two moments for each trained number; it counts one.": (nf4, 4, 9),
            "It counts the two moments in float32; in 8 bits they take 1 byte each.": (nf4, 4, 16),
            "The frozen base has no gradient and no optimizer state.": (nf4 + 6, 10, adapter),
            "The frozen base has no gradient.": (nf4 + 4, 8, adapter),
            "The frozen base has no optimizer state.": (nf4 + 2, 6, adapter),
        }
        for hint, prices in recipes.items():
            totals = [sum(n * price for n, price in zip(case, prices, strict=True)) for case in cases]
            if all(math.isclose(*pair, rel_tol=0.005) for pair in zip(results, totals, strict=True)):
                if hint:
                    raise Hint(hint)
                return
        right = sum(n * price for n, price in zip(cases[0], recipes[""], strict=True)) / 1e6
        raise Hint(
            "For linear={:,}, other={:,}, adapter={:,} it should be {:.0f} million bytes, and it is {:.0f}.".format(
                *cases[0], right, results[0] / 1e6
            )
        )

    check(
        answer, test, "Most of the bytes are the base's; what is trained adds little, gradient and optimizer included."
    )


def smallest_rank(answer: Callable[[list[tuple[int, int]], int], int]) -> None:
    """Check `smallest_rank(shapes, elements)`: the smaller side of the smallest layer decides, rounded up."""

    def test() -> None:
        cases = [
            ([(576, 576), (192, 576), (1536, 576), (576, 1536)], 4096),
            ([(320, 448), (256, 704)], 4096),  # 16 exactly
            ([(704, 100), (300, 640)], 100_000),
            ([(512, 3000)], 4096),
        ]
        results = [_number(answer(list(shapes), elements)) for shapes, elements in cases]
        right = [_ranks(shapes, elements, min) for shapes, elements in cases]
        mistakes: dict[str, Callable[[list[tuple[int, int]], int], float]] = {
            "It rounds down, so the smallest matrix stays just below the limit: round up.": lambda s, n: (
                n // min(map(min, s))
            ),
            "It does not round: a rank is a whole number, and must reach the limit, so round up.": lambda s, n: (
                n / min(map(min, s))
            ),
            "It asks for more elements than the limit; a matrix with exactly that many is large enough.": lambda s, n: (
                n // min(map(min, s)) + 1
            ),
            "It looks at A, (r, d_in), only; B, (d_out, r), has to reach the limit too.": lambda s, n: (
                -(n // -min(d_in for _, d_in in s))
            ),
            "It looks at B, (d_out, r), only; A, (r, d_in), has to reach the limit too.": lambda s, n: (
                -(n // -min(d_out for d_out, _ in s))
            ),
            "It goes by the largest matrix; every one has to reach the limit, so the smallest decides.": lambda s, n: (
                _ranks(s, n, max)
            ),
            "A and B have state of their own: neither A and B together nor W_0 has to reach the limit.": lambda s, n: (
                max(-(n // -(d_out + d_in)) for d_out, d_in in s)
            ),
        }
        for hint, wrong in mistakes.items():
            if results != right and results == [wrong(*case) for case in cases]:
                raise Hint(hint)
        for (shapes, elements), result, expected in zip(cases, results, right, strict=True):
            if result != expected:
                raise Hint(f"For {shapes} and {elements:,} elements it should be {expected}, and it is {result:g}.")

    check(answer, test, "The smallest side of any adapted layer decides.")


def first_bad_step(answer: Callable[[LogHistory], int | None]) -> None:
    """Check `first_bad_step(log_history)`: the first step whose loss or gradient norm is not finite, or None."""

    def test() -> None:
        histories = {name: _history(*entries) for name, entries in HISTORIES.items()}
        try:
            results = {name: answer([dict(entry) for entry in history]) for name, history in histories.items()}
        except KeyError as error:
            raise Hint(
                f"It asks every entry for {error}, and evaluations and the summary have none: entry.get."
            ) from None
        right = {"filtered": 3, "every five steps": 10, "unfiltered": 2, "inf": 4, "healthy": None, "masked": None}
        if results == right:
            return
        if all(result is None for result in results.values()):
            raise Hint("It finds nothing, or returns nothing. NaN equals nothing, not even itself: ask math.isfinite.")
        if any(result is not None and not isinstance(result, int) for result in results.values()):
            raise Hint("Return the number of the step, an int, or None.")
        if results["masked"] is not None and results["masked"] == 2:
            raise Hint("A loss of 0.0 alone is no proof: a batch without labels has it too. Look at the gradient norm.")
        if results["filtered"] is None and results["every five steps"] is None and results["unfiltered"] == 2:
            raise Hint("It looks at the loss, which the filter has mended. Look at the gradient norm as well.")
        if results == right | {"inf": results["inf"]}:
            raise Hint("It misses infinity: a gradient norm of inf ruins the weights as NaN does. Ask math.isfinite.")
        if results == right | {"unfiltered": 3, "inf": None}:
            raise Hint("It looks for NaN in the gradient norm only: the loss may be NaN first, and a norm may be inf.")
        if results == right | {"unfiltered": 3}:
            raise Hint("It looks at the gradient norm only. Where the loss is NaN, the step is bad as well.")
        if results == {
            "filtered": 2,
            "every five steps": 1,
            "unfiltered": 1,
            "inf": 3,
            "healthy": None,
            "masked": None,
        }:
            raise Hint("It returns the position in the list; the number of the step is under the key 'step'.")
        if results["filtered"] == 2 and results["inf"] == 3:
            raise Hint("It returns the last good step; the first bad one is asked for.")
        if results["filtered"] == 5:
            raise Hint("It returns the last bad step; the first one is asked for.")
        for name, expected in right.items():
            if results[name] != expected:
                raise Hint(f"For the log {histories[name]} it should be {expected}, and it is {results[name]}.")

    check(answer, test, "The gradient norm tells what the filtered loss hides.")


def merge_error(
    answer: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, Callable[[torch.Tensor], torch.Tensor]], float],
) -> None:
    """Check `merge_error(weight, A, B, scaling, to_nf4)`: what rounding the merged weight loses of the change."""

    def test() -> None:
        generator = torch.Generator().manual_seed(0)
        weight = _to_nf4(0.05 * torch.randn(64, 128, generator=generator))
        a, b = (0.1 * torch.randn(*shape, generator=generator) for shape in ((4, 128), (64, 4)))
        scaling = 0.25
        delta = scaling * b @ a
        merged = weight + delta
        result = _number(answer(weight.clone(), a.clone(), b.clone(), scaling, _to_nf4))
        lost = _to_nf4(merged) - merged
        mistakes = {
            "It leaves out the scaling: the change is scaling * B @ A.": _relative(
                _to_nf4(weight + b @ a) - weight - b @ a, b @ a
            ),
            "It divides by the scaling; the change is scaling * B @ A.": _relative(
                _to_nf4(weight + b @ a / scaling) - weight - b @ a / scaling, b @ a / scaling
            ),
            "It rounds the change alone. What is rounded is the sum, weight + change.": _relative(
                _to_nf4(delta) - delta, delta
            ),
            "It measures against the whole weight; measure against the change, which is what was learned.": _relative(
                lost, merged
            ),
            "It measures against the base weight; measure against the change, which is what was learned.": _relative(
                lost, weight
            ),
            "It compares the rounded weight with the base; compare it with weight + change.": _relative(
                _to_nf4(merged) - weight, delta
            ),
            "It subtracts a change that was rounded by itself; compare with weight + change.": _relative(
                _to_nf4(merged) - weight - _to_nf4(delta), delta
            ),
            "It returns the square of the norms' ratio: take norms, not sums of squares.": _relative(lost, delta) ** 2,
            "It is not relative: divide by the norm of the change.": lost.norm().item(),
        }
        if math.isclose(result, _relative(lost, delta), rel_tol=1e-3):
            return
        for hint, wrong in mistakes.items():
            if math.isclose(result, wrong, rel_tol=1e-3):
                raise Hint(hint)
        if result == 0:
            raise Hint("It finds no error at all: to_nf4 has to be applied to weight + change.")
        raise Hint(f"On our weight it should be {_relative(lost, delta):.3f}, and it is {result:.3f}.")

    check(
        answer, test, "The distance between two levels follows the weights, not the change, which is small beside it."
    )


# step, loss, gradient norm. The filter puts a little less than the mean since the last line in a NaN's place, or 0.0.
HISTORIES: dict[str, list[tuple[int, float, float]]] = {
    "filtered": [(1, 3.9, 2.1), (2, 3.1, 1.7), (3, 0.0, NAN), (4, 0.0, NAN), (5, 0.0, NAN)],
    "every five steps": [(5, 2.9, 1.2), (10, 1.7, NAN), (15, 0.0, NAN)],
    "unfiltered": [(1, 3.9, 2.1), (2, NAN, 1.0), (3, NAN, NAN)],
    "inf": [(1, 3.9, 2.1), (2, 3.1, 1.7), (3, 2.2, 1.9), (4, 8.8, INF), (5, 9.1, INF)],
    "healthy": [(1, 3.9, 2.1), (2, 3.1, 1.7), (3, 2.2, 1.9)],
    "masked": [(1, 3.9, 2.1), (2, 0.0, 0.0), (3, 2.2, 1.9)],
}


def _history(*entries: tuple[int, float, float]) -> LogHistory:
    """Return a log as the Trainer writes it, with an evaluation in it and its summary at the end."""
    log: LogHistory = [{"step": step, "loss": loss, "grad_norm": norm, "epoch": 0.1} for step, loss, norm in entries]
    last = entries[-1][0]
    log.append({"step": last, "eval_loss": 1.5, "epoch": 1.0})
    log.append({"step": last, "train_loss": 1.0, "train_runtime": 9.0, "epoch": 1.0})
    return log


def _ranks(shapes: list[tuple[int, int]], elements: int, choose: Callable[..., int]) -> int:
    return -(elements // -choose(choose(shape) for shape in shapes))


def _to_nf4(weight: torch.Tensor) -> torch.Tensor:
    """Round a weight to NF4 and back."""
    return bnb.dequantize_4bit(*bnb.quantize_4bit(weight, quant_type="nf4"))


def _relative(difference: torch.Tensor, reference: torch.Tensor) -> float:
    return (difference.norm() / reference.norm()).item()


def _number(value: object) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if value is None:
        raise Hint("It returns None; return the number.")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Hint(f"It returns {type(value).__name__}; return one number.")
    return value
