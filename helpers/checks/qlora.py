"""The exercises of notebook 08: the right answers and the likely wrong ones, each with its hint."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from helpers.checks.base import Answer, Exercise, Hint, same

import torch
from bitsandbytes import functional as bnb
from torch import Tensor

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # code, 8-bit scale of a block of 64, fp32 scale of 256 of these
NF4 = NF4_BITS / 8
NAN, INF = float("nan"), float("inf")


def _bytes(linear: float = NF4, other: float = 4, adapter: float = 10) -> Answer:
    """Return a training_bytes with these prices. An adapter has weight 4, gradient 4, two moments of 1 byte each."""
    return lambda n, m, k: n * linear + m * other + k * adapter


training_bytes = Exercise(
    right=lambda linear, other, adapter: _bytes()(linear, other, adapter),
    cases=[(106_000_000, 28_000_000, 2_400_000), (1_600_000_000, 100_000_000, 9_000_000), (30_000, 400_000, 1)],
    agrees=partial(same, rtol=0.005),
    mistakes={
        "It counts bits and not bytes for the 4-bit weights: divide by 8.": _bytes(linear=NF4_BITS),
        "4.5 bits are those without double quantization; with it there are 4.127.": _bytes(linear=4.5 / 8),
        "It leaves out the scales of the blocks: a 4-bit weight costs 4.127 bits.": _bytes(linear=0.5),
        "The unquantized weights are in float32 after prepare_model_for_kbit_training: 4 bytes.": _bytes(other=2),
        "Embeddings and norms are not quantized: only the weights of the linear layers are.": _bytes(other=NF4),
        "It leaves out the unquantized weights of the base.": _bytes(other=0),
        "It leaves out the adapter's gradient.": _bytes(adapter=6),
        "It leaves out the optimizer's state.": _bytes(adapter=8),
        "It counts the adapter's weights only; they have a gradient and optimizer state too.": _bytes(adapter=4),
        "AdamW keeps two moments for each trained number; it counts one.": _bytes(adapter=9),
        "It counts the two moments in float32; in 8 bits they take 1 byte each.": _bytes(adapter=16),
        "The frozen base has no gradient and no optimizer state.": _bytes(NF4 + 6, 10),
        "The frozen base has no gradient.": _bytes(NF4 + 4, 8),
        "The frozen base has no optimizer state.": _bytes(NF4 + 2, 6),
    },
    returns="one number",
    otherwise=lambda linear, other, adapter, found, right: (
        f"For linear={linear:,}, other={other:,}, adapter={adapter:,} it should be {right / 1e6:.0f} million bytes, "
        f"and it is {found / 1e6:.0f}."
    ),
    learned="Most of the bytes are the base's; what is trained adds little, gradient and optimizer included.",
)

Shapes = list[tuple[int, int]]


def _rank(side: Callable[[Shapes], int], quotient: Callable[[int, int], float] = lambda n, d: -(n // -d)) -> Answer:
    """Return a smallest_rank that divides the elements by `side(shapes)`, and rounds up unless told otherwise."""
    return lambda shapes, elements: quotient(elements, side(shapes))


def _smallest(shapes: Shapes) -> int:
    return min(map(min, shapes))


smallest_rank = Exercise(
    right=_rank(_smallest),
    cases=[
        ([(576, 576), (192, 576), (1536, 576), (576, 1536)], 4096),
        ([(320, 448), (256, 704)], 4096),  # 16 exactly
        ([(704, 100), (300, 640)], 100_000),
        ([(512, 3000)], 4096),
    ],
    mistakes={
        "It rounds down, so the smallest matrix stays just below the limit: round up.":
            _rank(_smallest, lambda n, d: n // d),
        "It does not round: a rank is a whole number, and must reach the limit, so round up.":
            _rank(_smallest, lambda n, d: n / d),
        "It asks for more elements than the limit; a matrix with exactly that many is large enough.":
            _rank(_smallest, lambda n, d: n // d + 1),
        "It looks at A, (r, d_in), only; B, (d_out, r), has to reach the limit too.":
            _rank(lambda shapes: min(d_in for _, d_in in shapes)),
        "It looks at B, (d_out, r), only; A, (r, d_in), has to reach the limit too.":
            _rank(lambda shapes: min(d_out for d_out, _ in shapes)),
        "It goes by the largest matrix; every one has to reach the limit, so the smallest decides.":
            _rank(lambda shapes: max(map(max, shapes))),
        "A and B have state of their own: neither A and B together nor W_0 has to reach the limit.":
            _rank(lambda shapes: min(map(sum, shapes))),
    },
    returns="the rank, an int",
    otherwise=lambda shapes, elements, found, right: (
        f"For {shapes} and {elements:,} elements it should be {right}, and it is {found:g}."
    ),
    learned="The smallest side of any adapted layer decides.",
)  # fmt: skip

Log = list[dict[str, float]]


def _log(*entries: tuple[int, float, float]) -> tuple[Log]:
    """Return a log of (step, loss, norm) as the Trainer writes it, with an evaluation, and its summary at the end."""
    log: Log = [{"step": step, "loss": loss, "grad_norm": norm, "epoch": 0.1} for step, loss, norm in entries]
    last = entries[-1][0]
    log.append({"step": last, "eval_loss": 1.5, "epoch": 1.0})
    log.append({"step": last, "train_loss": 1.0, "train_runtime": 9.0, "epoch": 1.0})
    return (log,)


def _first(bad: Callable[[float, float], bool], value: Answer = lambda log, i: log[i]["step"]) -> Answer:
    """Return a first_bad_step that asks `bad(loss, norm)` of each entry."""
    return lambda log: next(
        (value(log, i) for i, e in enumerate(log) if bad(e.get("loss", 1.0), e.get("grad_norm", 1.0))), None
    )


def _bad(loss: float, norm: float) -> bool:
    return not (math.isfinite(loss) and math.isfinite(norm))


NONE = "and evaluations and the summary have none: entry.get."


def _asked(answer: Answer, log: Log) -> Any:
    try:
        return answer(log)
    except KeyError as error:
        if error.args[0] in ("loss", "grad_norm"):
            raise Hint(f"It asks every entry for {error}, {NONE}") from None
        raise


def _step(log: Log, found: Any, right: int | None) -> str:
    if found is not None and not isinstance(found, int):
        return "Return the number of the step, an int, or None."
    return f"For the log {log} it should be {right}, and it is {found}."


first_bad_step = Exercise(
    right=_first(_bad),
    cases=[
        # The filter puts a little less than the mean since the last line in a NaN's place, or 0.0.
        _log((1, 3.9, 2.1), (2, 3.1, 1.7), (3, 0.0, NAN), (4, 0.0, NAN), (5, 0.0, NAN)),
        _log((5, 2.9, 1.2), (10, 1.7, NAN), (15, 0.0, NAN)),  # a line for every five steps
        _log((1, 3.9, 2.1), (2, NAN, 1.0), (3, NAN, NAN)),  # unfiltered
        _log((1, 3.9, 2.1), (2, 3.1, 1.7), (3, 2.2, 1.9), (4, 8.8, INF), (5, 9.1, INF)),
        _log((1, 3.9, 2.1), (2, 3.1, 1.7), (3, 2.2, 1.9)),  # healthy
        _log((1, 3.9, 2.1), (2, 0.0, 0.0), (3, 2.2, 1.9)),  # a batch without labels
    ],
    mistakes={
        "It finds nothing, or returns nothing. NaN equals nothing, not even itself: ask math.isfinite.": lambda log: (
            None
        ),
        f"It asks every entry for 'loss', {NONE}":
            lambda log: next((e["step"] for e in log if _bad(e["loss"], e["grad_norm"])), None),
        "Return the number of the step, an int, or None.": _first(_bad, lambda log, i: str(log[i]["step"])),
        "A loss of 0.0 alone is no proof: a batch without labels has it too. Look at the gradient norm.": [
            _first(lambda loss, norm: loss == 0.0 or _bad(loss, norm)),
            _first(lambda loss, norm: loss == 0.0 or not math.isfinite(loss)),
        ],
        "It looks at the loss, which the filter has mended. Look at the gradient norm as well.": [
            _first(lambda loss, norm: not math.isfinite(loss)),
            _first(lambda loss, norm: math.isnan(loss) or math.isinf(norm)),
        ],
        "It misses infinity: a gradient norm of inf ruins the weights as NaN does. Ask math.isfinite.":
            _first(lambda loss, norm: math.isnan(loss) or math.isnan(norm)),
        "It looks for NaN in the gradient norm only: the loss may be NaN first, and a norm may be inf.":
            _first(lambda loss, norm: math.isnan(norm)),
        "It looks at the gradient norm only. Where the loss is NaN, the step is bad as well.":
            _first(lambda loss, norm: not math.isfinite(norm)),
        "It returns the position in the list; the number of the step is under the key 'step'.":
            _first(_bad, lambda log, i: i),
        "It returns the last good step; the first bad one is asked for.":
            _first(_bad, lambda log, i: log[i - 1]["step"]),
        "It returns the last bad step; the first one is asked for.": lambda log: _first(_bad)(log[::-1]),
    },
    run=_asked,
    returns="the number of the step, an int, or None",
    otherwise=_step,
    learned="The gradient norm tells what the filtered loss hides.",
)  # fmt: skip


def _to_nf4(weight: Tensor) -> Tensor:
    """Round a weight to NF4 and back."""
    return bnb.dequantize_4bit(*bnb.quantize_4bit(weight, quant_type="nf4"))


def _relative(
    lost: Callable[[Tensor, Tensor, Answer], Tensor] = lambda w, change, to_nf4: to_nf4(w + change) - w - change,
    to: Callable[[Tensor, Tensor], Tensor] = lambda w, change: change,
    change: Callable[[Tensor, float], Tensor] = lambda product, scaling: scaling * product,
) -> Answer:
    """Return a merge_error: the norm of what is lost, by the norm of what it is measured against."""

    def answer(weight: Tensor, A: Tensor, B: Tensor, scaling: float, to_nf4: Answer) -> float:
        delta = change(B @ A, scaling)
        return (lost(weight, delta, to_nf4).norm() / to(weight, delta).norm()).item()

    return answer


_generator = torch.Generator().manual_seed(0)
_weight = _to_nf4(0.05 * torch.randn(64, 128, generator=_generator))
_A, _B = (0.1 * torch.randn(*shape, generator=_generator) for shape in ((4, 128), (64, 4)))

merge_error = Exercise(
    right=_relative(),
    cases=[(_weight, _A, _B, 0.25, _to_nf4)],
    agrees=partial(same, rtol=1e-3),
    mistakes={
        "It leaves out the scaling: the change is scaling * B @ A.": _relative(change=lambda product, scaling: product),
        "It divides by the scaling; the change is scaling * B @ A.":
            _relative(change=lambda product, scaling: product / scaling),
        "It rounds the change alone. What is rounded is the sum, weight + change.":
            _relative(lambda w, change, to_nf4: to_nf4(change) - change),
        "It measures against the whole weight; measure against the change, which is what was learned.":
            _relative(to=lambda w, change: w + change),
        "It measures against the base weight; measure against the change, which is what was learned.":
            _relative(to=lambda w, change: w),
        "It compares the rounded weight with the base; compare it with weight + change.":
            _relative(lambda w, change, to_nf4: to_nf4(w + change) - w),
        "It subtracts a change that was rounded by itself; compare with weight + change.":
            _relative(lambda w, change, to_nf4: to_nf4(w + change) - w - to_nf4(change)),
        "It returns the square of the norms' ratio: take norms, not sums of squares.":
            lambda *given: _relative()(*given) ** 2,
        "It is not relative: divide by the norm of the change.": _relative(to=lambda w, change: torch.ones(1)),
        "It finds no error at all: to_nf4 has to be applied to weight + change.": lambda *given: 0.0,
    },
    returns="one number",
    otherwise=lambda *values: f"On our weight it should be {values[-1]:.3f}, and it is {values[-2]:.3f}.",
    learned="The distance between two levels follows the weights, not the change, which is small beside it.",
)  # fmt: skip
