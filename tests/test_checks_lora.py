"""The checks of notebook 01: the solution passes, the stub does not, and each mistake gets its hint."""

import math
import re

from helpers.checks import lora as checks

import pytest
import torch
from exercises import exercise_functions, said
from torch import nn

STUBS, SOLUTIONS = exercise_functions("01_lora_math")


def _svd(delta_w):
    return torch.linalg.svd(delta_w, full_matrices=False)


def _smallest(delta_w, r):
    U, s, Vh = _svd(delta_w)
    return (U[:, -r:] * s[-r:]) @ Vh[-r:]


def _no_singular_values(delta_w, r):
    U, _, Vh = _svd(delta_w)
    return U[:, :r] @ Vh[:r]


def _v_transposed_twice(delta_w, r):
    U, s, Vh = _svd(delta_w)
    return (U[:, :r] * s[:r]) @ Vh.T[:r]


def _corner(delta_w, r):
    result = torch.zeros_like(delta_w)
    result[:r, :r] = delta_w[:r, :r]
    return result


def _factor(delta_w, r):
    U, s, _ = _svd(delta_w)
    return U[:, :r] * s[:r]


def _one_too_many(delta_w, r):
    U, s, Vh = _svd(delta_w)
    return (U[:, : r + 1] * s[: r + 1]) @ Vh[: r + 1]


def _rows(delta_w, r):
    result = delta_w.clone()
    result[r:] = 0
    return result


BEST_RANK_R = {
    _smallest: "keeps the smallest singular values",
    _no_singular_values: "singular values are left out",
    _v_transposed_twice: "transposes V once too often",
    (lambda delta_w, r: delta_w): "nothing has been dropped",
    _corner: "keeps a corner of the matrix",
    _factor: r"returns the shape \(9, 2\), expected \(9, 6\): multiply the factors back together",
    _one_too_many: r"For r=2 the result has rank 3 and error \d\.\d\d; the best error is",
    _rows: r"For r=2 the result has rank 2 and error \d\.\d\d; the best error is",
    (lambda delta_w, r: _svd(delta_w)): "returns linalg_svd; return a tensor",
    (lambda delta_w, r: delta_w * math.nan): "holds inf or NaN",
    (lambda delta_w, r: (torch.linalg.svd(delta_w)[0] @ delta_w).T): "returns the shape",
}


def _added_in_place(x, W_0, A, B, alpha):
    W_0 += alpha / len(A) * B @ A
    return x @ W_0.T


LORA_FORWARD = {
    (lambda x, W, A, B, alpha: x @ W.T + len(A) / alpha * (x @ A.T @ B.T)): "alpha / r is upside down",
    (lambda x, W, A, B, alpha: x @ W.T + x @ A.T @ B.T): "scaling alpha / r is missing",
    (lambda x, W, A, B, alpha: x @ W.T + alpha * (x @ A.T @ B.T)): "does not divide by r",
    (lambda x, W, A, B, alpha: x @ W.T + alpha / len(A) ** 0.5 * (x @ A.T @ B.T)): "square root of r, as rsLoRA",
    (lambda x, W, A, B, alpha: x @ W.T + alpha / A.shape[1] * (x @ A.T @ B.T)): "divides alpha by d_in",
    (lambda x, W, A, B, alpha: alpha / len(A) * (x @ W.T + x @ A.T @ B.T)): "scales W_0 x as well",
    (lambda x, W, A, B, alpha: alpha / len(A) * (x @ A.T @ B.T)): "W_0 x is missing",
    (lambda x, W, A, B, alpha: x @ W.T): "The update is missing",
    (lambda x, W, A, B, alpha: x @ W.T + alpha / len(A) * (x @ B @ A)): "A and B have swapped roles",
    (lambda x, W, A, B, alpha: x @ W + alpha / len(A) * (x @ A.T @ B.T)): "W_0 is transposed",
    (lambda x, W, A, B, alpha: x @ W.T + alpha / len(A) * (x @ B.T @ A.T)): "shapes do not fit.*x meets A first",
    (lambda x, W, A, B, alpha: x @ W.T + alpha / len(A) * (x @ A @ B)): "shapes do not fit.*x meets A first",
    (lambda x, W, A, B, alpha: x @ W.T - alpha / len(A) * (x @ A.T @ B.T)): "values differ.*the two terms one by one",
    (lambda x, W, A, B, alpha: (x @ W.T)[0]): r"returns the shape \(3, 6\), expected \(4, 3, 6\)",
    _added_in_place: "changes W_0 in place",
}


def _targets(model, names):
    return [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.split(".")[-1] in names]


def _summed(formula):
    return lambda model, names, r: sum(formula(r, m.in_features, m.out_features) for m in _targets(model, names))


def _matching(match):
    def count(model, names, r):
        found = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and match(n, names)]
        return sum(r * (m.in_features + m.out_features) for m in found)

    return count


PARAMETER_COUNT = {
    _summed(lambda r, d_in, d_out: r * d_in * d_out): "multiplies d_in and d_out",
    _summed(lambda r, d_in, d_out: r * d_in): "counts A alone",
    _summed(lambda r, d_in, d_out: r * d_out): "counts B alone",
    _summed(lambda r, d_in, d_out: 2 * r * d_in): "every layer for square: d_out may differ",
    _summed(lambda r, d_in, d_out: 2 * r * d_out): "every layer for square: d_in may differ",
    _summed(lambda r, d_in, d_out: d_in * d_out): "counts the frozen weights W_0: that is",
    _summed(lambda r, d_in, d_out: r * (d_in + d_out) + d_in * d_out): "W_0 as well as A and B",
    _summed(lambda r, d_in, d_out: r * (d_in + d_out) + d_out): "counts a bias with each layer",
    _summed(lambda r, d_in, d_out: r * d_in + r + d_out * r + d_out): "counts biases for A and B",
    _summed(lambda r, d_in, d_out: d_in + d_out): "r is missing",
    (lambda model, names, r: SOLUTIONS["parameter_count"](model.blocks[0], names, r)): "counts one block only",
    _matching(lambda name, names: True): "counts every linear layer",
    _matching(lambda name, names: name.endswith(tuple(names))): "counts qkv_proj too",
    _matching(lambda name, names: name in names): "counts no layer.*full names",
    _summed(lambda r, d_in, d_out: r * (d_in + d_out) + 1): "It returns 184 for two blocks",
    (lambda model, names, r: SOLUTIONS["parameter_count"](model, ["q_proj", "v_proj"], r)): "but not for up_proj",
    (lambda model, names, r: float(SOLUTIONS["parameter_count"](model, names, r))): "returns float; return an int",
}


def _merged_in_place(W, A, B, alpha):
    W += (alpha / len(A) * B @ A).to(W.dtype)
    return W


MERGE = {
    (lambda W, A, B, alpha: W + len(A) / alpha * B @ A): "alpha / r is upside down",
    (lambda W, A, B, alpha: W + B @ A): "scaling alpha / r is missing",
    (lambda W, A, B, alpha: W + alpha * B @ A): "does not divide by r",
    (lambda W, A, B, alpha: W + alpha / len(A) ** 0.5 * B @ A): "square root of r, as rsLoRA",
    (lambda W, A, B, alpha: W - alpha / len(A) * B @ A): "that is un-merging",
    (lambda W, A, B, alpha: alpha / len(A) * B @ A): "W_0 is missing",
    (lambda W, A, B, alpha: W + alpha / len(A) * (A.T @ B.T)): "The update is transposed",
    (lambda W, A, B, alpha: W + alpha / len(A) * A @ B): "shapes do not fit.*A @ B has not",
    (lambda W, A, B, alpha: W + alpha / len(A) * (B @ A) ** 2): "values differ from W_0",
    (lambda W, A, B, alpha: (W + alpha / len(A) * B @ A)[:2]): r"returns the shape \(2, 6\), expected \(6, 6\)",
    _merged_in_place: "changes W_0 in place",
    (lambda W, A, B, alpha: W + alpha / len(A) * B @ A): "in bfloat16 it returns float32: convert the sum back",
    (lambda W, A, B, alpha: W + (alpha / len(A) * B @ A).to(W.dtype)): r"\d+% of the entries are off by a rounding",
    (lambda W, A, B, alpha: W + alpha / len(A) * (B.to(W.dtype) @ A.to(W.dtype))): "entries are off by a rounding",
}
WRONG = {"best_rank_r": BEST_RANK_R, "lora_forward": LORA_FORWARD, "parameter_count": PARAMETER_COUNT, "merge": MERGE}
# Other right answers than the notebook's.
RIGHT = {
    "best_rank_r": [
        lambda delta_w, r: torch.linalg.multi_dot(
            [(u := torch.linalg.svd(delta_w))[0][:, :r], torch.diag(u.S[:r]), u.Vh[:r]]
        ),
        lambda delta_w, r: (p := torch.linalg.eigh(delta_w @ delta_w.T)[1][:, -r:]) @ p.T @ delta_w,
    ],
    "lora_forward": [
        lambda x, W, A, B, alpha: x @ (W + alpha / len(A) * B @ A).T,
        lambda x, W, A, B, alpha: nn.functional.linear(x, W) + nn.functional.linear(alpha / len(A) * x @ A.T, B),
    ],
    "parameter_count": [_summed(lambda r, d_in, d_out: torch.empty(r, d_in).numel() + torch.empty(d_out, r).numel())],
    "merge": [
        lambda W, A, B, alpha: (W.double() + alpha * B.double() @ A.double() / len(A)).to(W.dtype),
        lambda W, A, B, alpha: (W + (alpha / len(A) * B) @ A).to(W.dtype),
    ],
}


def test_every_exercise_is_tested():
    assert list(STUBS) == list(WRONG) == list(RIGHT)
    assert all(callable(getattr(checks, name)) for name in STUBS)


@pytest.mark.parametrize("name", list(WRONG))
def test_the_solution_passes_and_the_stub_does_not(name, capsys):
    assert ": correct. " in said(checks, capsys, name, SOLUTIONS[name])
    assert ": not written yet. " in said(checks, capsys, name, STUBS[name])


@pytest.mark.parametrize(("name", "number"), [(name, i) for name, right in RIGHT.items() for i in range(len(right))])
def test_other_right_answers_pass(name, number, capsys):
    assert ": correct. " in said(checks, capsys, name, RIGHT[name][number])


@pytest.mark.parametrize(
    ("name", "wrong", "hint"), [(name, *case) for name, cases in WRONG.items() for case in cases.items()]
)
def test_a_wrong_answer_gets_its_hint(name, wrong, hint, capsys):
    line = said(checks, capsys, name, wrong)
    assert f"{name}: not yet. " in line
    assert re.search(hint, line), line
