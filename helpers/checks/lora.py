"""The checks of notebook 01_lora_math.

Each compares the answer with the right one and with what the likely mistakes give, on matrices small enough that no
two of them agree by chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from helpers.checks.base import Hint, check

import torch
from torch import Tensor, nn


def best_rank_r(answer: Callable[[Tensor, int], Tensor]) -> None:
    """Check `best_rank_r(delta_w, r)`: the nearest matrix of rank r, by a truncated singular value decomposition."""

    def test() -> None:
        for d_out, d_in, r in ((9, 6, 2), (6, 9, 3), (7, 7, 1)):
            delta_w = _random(d_out, d_in)
            u, s, vh = torch.linalg.svd(delta_w, full_matrices=False)
            right = (u[:, :r] * s[:r]) @ vh[:r]
            result = _tensor(answer(delta_w.clone(), r), delta_w, "multiply the factors back together")
            corner = torch.zeros_like(delta_w)
            corner[:r, :r] = delta_w[:r, :r]
            mistakes = {
                "It keeps the smallest singular values. torch.linalg.svd sorts them from large to small, so the first "
                "r are the ones to keep.": (u[:, -r:] * s[-r:]) @ vh[-r:],
                "The singular values are left out: the pair u_i, v_i counts s_i times.": u[:, :r] @ vh[:r],
                "It transposes V once too often: torch.linalg.svd returns V transposed already, and v_i is row i of "
                "it.": (u[:, :r] * s[:r]) @ vh[:, :r].T,
                "It returns delta_w unchanged: nothing has been dropped.": delta_w,
                "It keeps a corner of the matrix. Keep the first singular values and their vectors.": corner,
            }
            error, best = float((delta_w - result).norm()), float((delta_w - right).norm())
            rank = int(torch.linalg.matrix_rank(result))
            otherwise = f"For r={r} the result has rank {rank} and error {error:.2f}; the best error is {best:.2f}."
            _compare(result, right, mistakes, otherwise)

    check(answer, test, "The r largest singular values and their vectors make the nearest matrix of rank r.")


def lora_forward(answer: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]) -> None:
    """Check `lora_forward(x, W_0, A, B, alpha)`: W_0 x + (alpha / r) B A x."""

    def test() -> None:
        alpha = 12.0
        for d_in, d_out in ((6, 6), (5, 7)):  # square first: there the likely mistakes have a result to compare with
            x, w_0, a, b = _random(4, 3, d_in), _random(d_out, d_in), _random(2, d_in), _random(d_out, 2)
            base, update = x @ w_0.T, x @ a.T @ b.T
            given = w_0.clone()
            try:
                result = answer(x.clone(), given, a.clone(), b.clone(), alpha)
            except NotImplementedError:  # a RuntimeError too
                raise
            except RuntimeError as error:
                raise Hint(
                    f"The shapes do not fit ({error}). x meets A first, which takes d_in to r, and then B, which takes "
                    "r to d_out; torch stores both as (out, in), so that each step is x @ matrix.T."
                ) from None
            result = _tensor(result, base, "(..., d_in) goes to (..., d_out)")
            if not torch.equal(given, w_0):
                raise Hint("It changes W_0 in place: W_0 is frozen, and the update is added to the output.")
            mistakes = {
                "alpha / r is upside down: it multiplies by r / alpha.": base + 2 / alpha * update,
                "The scaling alpha / r is missing.": base + update,
                "It multiplies by alpha and does not divide by r.": base + alpha * update,
                "It divides alpha by the square root of r, as rsLoRA does. Here the scaling is alpha / r.": (
                    base + alpha / math.sqrt(2) * update
                ),
                "It divides alpha by d_in. The rank r is the number of rows of A, A.shape[0].": (
                    base + alpha / d_in * update
                ),
                "It scales W_0 x as well: alpha / r belongs to the update alone.": alpha / 2 * (base + update),
                "W_0 x is missing: this is the update alone.": alpha / 2 * update,
                "The update is missing: this is W_0 x alone.": base,
            }
            if d_in == d_out:
                mistakes |= {
                    "A and B have swapped roles: x meets B before A. Shapes agree here only because d_in = d_out.": (
                        base + alpha / 2 * (x @ b @ a)
                    ),
                    "W_0 is transposed: torch stores it as (d_out, d_in), so W_0 x is x @ W_0.T.": (
                        x @ w_0 + alpha / 2 * update
                    ),
                }
            otherwise = "The values differ from W_0 x + (alpha / r) B A x. Compute the two terms one by one."
            _compare(result, base + alpha / 2 * update, mistakes, otherwise)

    check(answer, test, "The frozen layer and the detour through r numbers, added.")


def parameter_count(answer: Callable[[nn.Module, list[str], int], int]) -> None:
    """Check `parameter_count(model, target_names, r)`: r * (d_in + d_out), summed over the target layers."""

    def test() -> None:
        model, names, r = _two_blocks(), ["q_proj", "v_proj"], 3
        shapes = [(8, 10), (8, 4)]  # (d_in, d_out) of q_proj and v_proj, in each of two blocks
        right = sum(2 * r * (d_in + d_out) for d_in, d_out in shapes)
        base = sum(2 * d_in * d_out for d_in, d_out in shapes)
        mistakes = {
            "It multiplies d_in and d_out. A has r * d_in entries and B has r * d_out, so the two are added.": r * base,
            "It counts A alone: B has r * d_out entries.": sum(2 * r * d_in for d_in, _ in shapes),
            "It counts B alone: A has r * d_in entries.": sum(2 * r * d_out for _, d_out in shapes),
            "It takes every layer for square: d_out may differ from d_in, as in v_proj here.": (
                sum(2 * r * 2 * d_in for d_in, _ in shapes)
            ),
            "It takes every layer for square: d_in may differ from d_out, as in v_proj here.": (
                sum(2 * r * 2 * d_out for _, d_out in shapes)
            ),
            "It counts the frozen weights W_0: that is d_in * d_out for each layer, whatever r is.": base,
            "It counts the frozen weights W_0 as well as A and B.": right + base,
            "It counts a bias with each layer. LoRA adds A and B; the bias belongs to the frozen base.": (
                right + sum(2 * d_out for _, d_out in shapes)
            ),
            "It counts biases for A and B, which are plain matrices.": right
            + sum(2 * (r + d_out) for _, d_out in shapes),
            "It counts one block only: the same names come back in every block.": right // 2,
            "r is missing.": right // r,
            "It counts every linear layer, whatever its name.": (
                sum(r * (m.in_features + m.out_features) for m in model.modules() if isinstance(m, nn.Linear))
            ),
            "It counts qkv_proj too, whose name ends with v_proj. Compare the whole part after the last dot.": (
                right + 2 * r * (8 + 18)
            ),
            "It counts no layer. named_modules() gives full names, such as blocks.0.q_proj: compare the part after the "
            "last dot.": 0,
        }
        result = answer(model, names, r)
        if isinstance(result, bool) or not isinstance(result, int):
            raise Hint(f"It returns {type(result).__name__}; return an int.")
        for hint, value in mistakes.items():
            if result == value:
                raise Hint(hint)
        if result != right:
            raise Hint(
                f"It returns {result} for two blocks with q_proj 8 to 10, v_proj 8 to 4 and r=3: sum r * (8 + 10) "
                "and so on."
            )
        if answer(model, ["up_proj"], 5) != 2 * 5 * (8 + 20):
            raise Hint("It is right for q_proj and v_proj, but not for up_proj: use target_names and r as given.")

    check(answer, test, "The count grows with r * (d_in + d_out), not with d_in * d_out.")


def merge(answer: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> None:
    """Check `merge(W_0, A, B, alpha)`: W_0 + (alpha / r) B A, rounded once to the dtype of W_0."""

    def test() -> None:
        alpha, r = 12.0, 2
        for d_out, d_in in ((6, 6), (7, 5)):  # square first, as in lora_forward
            w_0, a, b = _random(d_out, d_in), _random(r, d_in), _random(d_out, r)
            given, delta = w_0.clone(), b @ a
            try:
                result = answer(given, a.clone(), b.clone(), alpha)
            except NotImplementedError:  # a RuntimeError too
                raise
            except RuntimeError as error:
                raise Hint(
                    f"The shapes do not fit ({error}). B is (d_out, r) and A is (r, d_in): B @ A has the shape of W_0, "
                    "A @ B has not."
                ) from None
            result = _tensor(result, w_0, "the merged weight has the shape of W_0")
            if not torch.equal(given, w_0):
                raise Hint("It changes W_0 in place. Return a new tensor: the base may serve other adapters.")
            mistakes = {
                "alpha / r is upside down: it multiplies by r / alpha.": w_0 + r / alpha * delta,
                "The scaling alpha / r is missing.": w_0 + delta,
                "It multiplies by alpha and does not divide by r.": w_0 + alpha * delta,
                "It divides alpha by the square root of r, as rsLoRA does. Here the scaling is alpha / r.": (
                    w_0 + alpha / math.sqrt(r) * delta
                ),
                "It subtracts the update: that is un-merging.": w_0 - alpha / r * delta,
                "W_0 is missing: this is the update alone.": alpha / r * delta,
            }
            if d_in == d_out:
                mistakes["The update is transposed: it is B @ A, and (B @ A).T equals A.T @ B.T."] = (
                    w_0 + alpha / r * delta.T
                )
            otherwise = "The values differ from W_0 + (alpha / r) B A. Compute the update first, and look at it."
            _compare(result, w_0 + alpha / r * delta, mistakes, otherwise)
        _merge_in_bfloat16(answer)

    check(answer, test, "One matrix of the old shape and dtype: a merged layer costs nothing extra to run.")


def _merge_in_bfloat16(answer: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> None:
    w_0 = _random(64, 48).to(torch.bfloat16)
    a, b = (0.2 * _random(*shape).float() for shape in ((4, 48), (64, 4)))
    result = answer(w_0.clone(), a.clone(), b.clone(), 4.0)
    if not isinstance(result, Tensor) or result.dtype != torch.bfloat16:
        kind = str(getattr(result, "dtype", type(result).__name__)).removeprefix("torch.")
        raise Hint(f"For W_0 in bfloat16 it returns {kind}: convert the sum back to the dtype of W_0.")
    expected = (w_0.float() + b @ a).to(torch.bfloat16)
    wrong = float((result != expected).float().mean())
    if wrong > 0.02:  # another order of the products moves a few entries in ten thousand across a rounding boundary
        raise Hint(
            f"For W_0 in bfloat16, {wrong:.0%} of the entries are off by a rounding: add in float32 and round once, at "
            "the end."
        )


def _two_blocks() -> nn.Module:
    """Return a model with biases, with layers that are not square, and with a name that ends like another."""

    def block() -> nn.ModuleDict:
        shapes = {"q_proj": (8, 10), "v_proj": (8, 4), "qkv_proj": (8, 18), "up_proj": (8, 20)}
        return nn.ModuleDict({name: nn.Linear(*shape) for name, shape in shapes.items()} | {"norm": nn.LayerNorm(8)})

    with torch.device("meta"):
        return nn.ModuleDict({"blocks": nn.ModuleList([block(), block()])})


def _random(*shape: int) -> Tensor:
    """Return random float64 numbers, the same ones for the same shape."""
    generator = torch.Generator().manual_seed(int("".join(map(str, shape))))
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def _tensor(result: object, like: Tensor, advice: str) -> Tensor:
    if not isinstance(result, Tensor):
        raise Hint(f"It returns {type(result).__name__}; return a tensor of shape {tuple(like.shape)}.")
    if result.shape != like.shape:
        raise Hint(f"It returns the shape {tuple(result.shape)}, expected {tuple(like.shape)}: {advice}.")
    if not torch.isfinite(result).all():
        raise Hint("Its result holds inf or NaN.")
    return result.detach().to(torch.float64)


def _compare(result: Tensor, right: Tensor, mistakes: dict[str, Tensor], otherwise: str) -> None:
    """Raise the hint of the mistake whose result this is, or `otherwise`, unless the result is right."""
    if torch.allclose(result, right):
        return
    raise Hint(next((hint for hint, wrong in mistakes.items() if torch.allclose(result, wrong)), otherwise))
