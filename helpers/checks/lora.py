"""The exercises of notebook 01: a reference answer and the likely wrong ones, each with its hint."""

from __future__ import annotations

import math

from helpers.checks.base import Answer, Exercise, Hint

import torch
from torch import Tensor, nn


def _random(*shape: int) -> Tensor:
    """Return random float64 numbers, the same ones for the same shape."""
    generator = torch.Generator().manual_seed(int("".join(map(str, shape))))
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def _svd(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(w, full_matrices=False)


def _corner(w: Tensor, r: int) -> Tensor:
    result = torch.zeros_like(w)
    result[:r, :r] = w[:r, :r]
    return result


def _truncated(delta_w: Tensor, r: int) -> Tensor:
    u, s, vh = _svd(delta_w)
    return (u[:, :r] * s[:r]) @ vh[:r]


def _rank_and_error(delta_w: Tensor, r: int, found: Tensor, right: Tensor) -> str:
    rank, error, best = torch.linalg.matrix_rank(found), (delta_w - found).norm(), (delta_w - right).norm()
    return f"For r={r} the result has rank {rank} and error {error:.2f}; the best error is {best:.2f}."


best_rank_r = Exercise(
    right=_truncated,
    cases=[(_random(9, 6), 2), (_random(6, 9), 3), (_random(7, 7), 1)],
    mistakes={
        "It keeps the smallest singular values. torch.linalg.svd sorts them from large to small, so the first r are "
        "the ones to keep.": lambda w, r: (_svd(w)[0][:, -r:] * _svd(w)[1][-r:]) @ _svd(w)[2][-r:],
        "The singular values are left out: the pair u_i, v_i counts s_i times.":
            lambda w, r: _svd(w)[0][:, :r] @ _svd(w)[2][:r],
        "It transposes V once too often: torch.linalg.svd returns V transposed already, and v_i is row i of it.":
            lambda w, r: (_svd(w)[0][:, :r] * _svd(w)[1][:r]) @ _svd(w)[2][:, :r].T,
        "It returns delta_w unchanged: nothing has been dropped.": lambda w, r: w,
        "It keeps a corner of the matrix. Keep the first singular values and their vectors.": _corner,
    },
    returns="one matrix: multiply the factors back together",
    otherwise=_rank_and_error,
    learned="The r largest singular values and their vectors make the nearest matrix of rank r.",
)  # fmt: skip

FACTOR = {  # wrong scalings, of either exercise
    "alpha / r is upside down: it multiplies by r / alpha.": lambda a, r, d: r / a,
    "The scaling alpha / r is missing.": lambda a, r, d: 1.0,
    "It multiplies by alpha and does not divide by r.": lambda a, r, d: a,
    "It divides alpha by the square root of r, as rsLoRA does. Here the scaling is alpha / r.": lambda a, r, d: (
        a / math.sqrt(r)
    ),
    "It divides alpha by d_in. The rank r is the number of rows of A, A.shape[0].": lambda a, r, d: a / d,
}

lora_forward = Exercise(
    right=lambda x, W_0, A, B, alpha: x @ W_0.T + alpha / len(A) * (x @ A.T @ B.T),
    cases=[(_random(4, 3, i), _random(o, i), _random(2, i), _random(o, 2), 12.0) for i, o in ((6, 6), (5, 7))],
    mistakes={hint: lambda x, W, A, B, a, f=f: x @ W.T + f(a, *A.shape) * (x @ A.T @ B.T) for hint, f in FACTOR.items()}
    | {
        "It scales W_0 x as well: alpha / r belongs to the update alone.":
            lambda x, W, A, B, a: a / len(A) * (x @ W.T + x @ A.T @ B.T),
        "W_0 x is missing: this is the update alone.": lambda x, W, A, B, a: a / len(A) * (x @ A.T @ B.T),
        "The update is missing: this is W_0 x alone.": lambda x, W, A, B, a: x @ W.T,
        "A and B have swapped roles: x meets B before A. Shapes agree here only because d_in = d_out.":
            lambda x, W, A, B, a: x @ W.T + a / len(A) * (x @ B @ A),
        "W_0 is transposed: torch stores it as (d_out, d_in), so W_0 x is x @ W_0.T.":
            lambda x, W, A, B, a: x @ W + a / len(A) * (x @ A.T @ B.T),
    },
    returns="a tensor in which (..., d_in) has become (..., d_out)",
    raises="x meets A first, which takes d_in to r, and then B, which takes r to d_out; torch stores both as "
    "(out, in), so that each step is x @ matrix.T.",
    otherwise=lambda *_: "The values differ from W_0 x + (alpha / r) B A x. Compute the two terms one by one.",
    learned="The frozen layer and the detour through r numbers, added.",
)  # fmt: skip


def _two_blocks() -> nn.Module:
    """Return a model with biases, with layers that are not square, and with a name that ends like another."""

    def block() -> nn.ModuleDict:
        shapes = {"q_proj": (8, 10), "v_proj": (8, 4), "qkv_proj": (8, 18), "up_proj": (8, 20)}
        return nn.ModuleDict({name: nn.Linear(*shape) for name, shape in shapes.items()} | {"norm": nn.LayerNorm(8)})

    with torch.device("meta"):  # without random numbers
        return nn.ModuleDict({"blocks": nn.ModuleList([block(), block()])}).to_empty(device="cpu")


def _sum(term: Answer, match: Answer = lambda name, names: name.split(".")[-1] in names) -> Answer:
    """Return an answer that sums `term(r, d_in, d_out)` over the linear layers whose names match."""
    return lambda model, names, r: sum(
        term(r, m.in_features, m.out_features)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and match(name, names)
    )


_count = _sum(lambda r, i, o: r * (i + o))
parameter_count = Exercise(
    right=_count,
    cases=[(_two_blocks(), ["q_proj", "v_proj"], 3), (_two_blocks(), ["up_proj"], 5)],
    mistakes={
        "It multiplies d_in and d_out. A has r * d_in entries and B has r * d_out, so the two are added.":
            _sum(lambda r, i, o: r * i * o),
        "It counts A alone: B has r * d_out entries.": _sum(lambda r, i, o: r * i),
        "It counts B alone: A has r * d_in entries.": _sum(lambda r, i, o: r * o),
        "It takes every layer for square: d_out may differ from d_in, as in v_proj here.": _sum(
            lambda r, i, o: 2 * r * i
        ),
        "It takes every layer for square: d_in may differ from d_out, as in v_proj here.": _sum(
            lambda r, i, o: 2 * r * o
        ),
        "It counts the frozen weights W_0: that is d_in * d_out for each layer, whatever r is.": _sum(
            lambda r, i, o: i * o
        ),
        "It counts the frozen weights W_0 as well as A and B.": _sum(lambda r, i, o: r * (i + o) + i * o),
        "It counts a bias with each layer. LoRA adds A and B; the bias belongs to the frozen base.":
            _sum(lambda r, i, o: r * (i + o) + o),
        "It counts biases for A and B, which are plain matrices.": _sum(lambda r, i, o: r * (i + o) + r + o),
        "It counts one block only: the same names come back in every block.": lambda m, n, r: _count(m, n, r) // 2,
        "r is missing.": _sum(lambda r, i, o: i + o),
        "It counts every linear layer, whatever its name.": _sum(lambda r, i, o: r * (i + o), lambda name, names: True),
        "It counts qkv_proj too, whose name ends with v_proj. Compare the whole part after the last dot.":
            _sum(lambda r, i, o: r * (i + o), lambda name, names: name.endswith(tuple(names))),
        "It counts no layer. named_modules() gives full names, such as blocks.0.q_proj: compare the part after the "
        "last dot.": lambda model, names, r: 0,
        "It is right for q_proj and v_proj, but not for up_proj: use target_names and r as given.":
            lambda model, names, r: _count(model, ["q_proj", "v_proj"], 3 if names == ["q_proj", "v_proj"] else r),
    },
    returns="an int",
    otherwise=lambda model, names, r, found, right: (
        f"It returns {found} for two blocks with q_proj 8 to 10, v_proj 8 to 4 and r={r}: sum r * (8 + 10) and so on."
    ),
    learned="The count grows with r * (d_in + d_out), not with d_in * d_out.",
)  # fmt: skip


def _rounds_once(answer: Answer) -> None:
    w_0, a, b = _random(64, 48).to(torch.bfloat16), 0.2 * _random(4, 48).float(), 0.2 * _random(64, 4).float()
    result = answer(w_0.clone(), a.clone(), b.clone(), 4.0)
    if not isinstance(result, Tensor) or result.dtype != torch.bfloat16:
        kind = str(getattr(result, "dtype", type(result).__name__)).removeprefix("torch.")
        raise Hint(f"For W_0 in bfloat16 it returns {kind}: convert the sum back to the dtype of W_0.")
    wrong = float((result != (w_0.float() + b @ a).to(torch.bfloat16)).float().mean())
    if wrong > 0.02:  # another order of the products moves a few entries in ten thousand across a rounding boundary
        raise Hint(
            f"For W_0 in bfloat16, {wrong:.0%} of the entries are off by a rounding: add in float32 and round once, at "
            "the end."
        )


merge = Exercise(
    right=lambda W_0, A, B, alpha: W_0 + alpha / len(A) * B @ A,
    cases=[(_random(o, i), _random(2, i), _random(o, 2), 12.0) for o, i in ((6, 6), (7, 5))],
    mistakes={
        hint: lambda W, A, B, a, f=f: W + f(a, *A.shape) * B @ A for hint, f in FACTOR.items() if "d_in" not in hint
    }
    | {
        "It subtracts the update: that is un-merging.": lambda W, A, B, a: W - a / len(A) * B @ A,
        "W_0 is missing: this is the update alone.": lambda W, A, B, a: a / len(A) * B @ A,
        "The update is transposed: it is B @ A, and (B @ A).T equals A.T @ B.T.":
            lambda W, A, B, a: W + a / len(A) * (B @ A).T,
    },
    returns="the merged weight, in the shape of W_0",
    raises="B is (d_out, r) and A is (r, d_in): B @ A has the shape of W_0, A @ B has not.",
    otherwise=lambda *_: "The values differ from W_0 + (alpha / r) B A. Compute the update first, and look at it.",
    further=[_rounds_once],
    learned="One matrix of the old shape and dtype: a merged layer costs nothing extra to run.",
)  # fmt: skip
