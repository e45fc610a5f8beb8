"""The checks of notebook 04_training_loops.

Each compares the answer with the library's own (transformers' schedule, torch's clipping, AdamW and GradScaler), and
with what the likely mistakes give.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from helpers.checks.base import Hint, check

import torch
from torch import Tensor, nn
from transformers import get_scheduler

Moments = tuple[Tensor, Tensor, Tensor]


def _half(x: float) -> float:
    """The falling half period of a cosine, from 1 at x = 0 to 0 at x = 1."""
    return (1 + math.cos(math.pi * x)) / 2


NO_GRADIENTS = "The step finds no gradients: call backward before it, and clear the gradients after it."
# What may follow the warm-up: functions of the share of the remaining updates that is done, and of the warm-up's share.
WRONG_SHAPES: dict[str, Callable[[float, float], float]] = {
    "The cosine starts at update 0: let it start at 1 where the warm-up ends.": lambda x, w: _half(w + x * (1 - w)),
    "After the warm-up `updates - warmup` are left: stretch the cosine over those.": lambda x, w: _half(x * (1 - w)),
    "This falls in a straight line: that is the linear schedule.": lambda x, w: 1 - x,
    "This is a full period, down and up again: take half a period, (1 + cos(pi x)) / 2.": lambda x, w: _half(2 * x),
    "This is a quarter of a cosine: take half a period, (1 + cos(pi x)) / 2.": lambda x, w: math.cos(math.pi / 2 * x),
    "cos(pi x) runs from 1 to -1, no rate is negative: take (1 + cos(pi x)) / 2.": lambda x, w: math.cos(math.pi * x),
    "math.cos takes radians: half a period is pi, not 180.": lambda x, w: (1 + math.cos(180 * x)) / 2,
}


def cosine_factor(answer: Callable[[int, int, int], float]) -> None:
    """Check `cosine_factor(update, warmup, updates)` against transformers' cosine schedule with warm-up."""

    def test() -> None:
        for warmup, updates in ((5, 40), (10, 30), (1, 12)):
            right = _library_factors(warmup, updates)
            results = [_number(answer(update, warmup, updates)) for update in range(updates)]
            rising, left = [(i + 1) / warmup for i in range(warmup)], updates - warmup
            too_early = [_half(i / (left - 1)) for i in range(left)]
            mistakes = {
                "The warm-up is missing: let it rise from 0 to 1 first.": [1.0] * warmup + right[warmup:],
                "It is one update ahead: updates are counted from 0, and update 0 has the factor 0.": [*right[1:], 0.0],
                "The warm-up is one update ahead: update 0 has the factor 0.": rising + right[warmup:],
                "It reaches 0 one update too early: divide by `updates - warmup`.": right[:warmup] + too_early,
            }
            for hint, shape in WRONG_SHAPES.items():
                mistakes[hint] = right[:warmup] + [shape(i / left, warmup / updates) for i in range(left)]
            for hint, wrong in mistakes.items():
                if not _close(results, right) and _close(results, wrong):
                    raise Hint(hint)
            for update, (result, expected) in enumerate(zip(results, right, strict=True)):
                if not math.isclose(result, expected, abs_tol=1e-6):
                    where = f"update={update}, warmup={warmup}, updates={updates}"
                    raise Hint(f"For {where} the factor is {expected:.4f}, and it says {result:.4f}.")

    check(answer, test, "This is the schedule that get_scheduler('cosine', …) makes, update for update.")


def clip_gradients(answer: Callable[[list[Tensor], float], list[Tensor]]) -> None:
    """Check `clip_gradients(gradients, max_norm)` against torch.nn.utils.clip_grad_norm_."""

    def test() -> None:
        long = [torch.tensor([[3.0, -4.0], [0.5, 0.25]]), torch.tensor([12.0, 0.1, -2.0])]
        short = [g / 100 for g in long]
        result, small = (answer([g.clone() for g in gradients], 2.0) for gradients in (long, short))
        if result is None:
            raise Hint("It returns None; return the list of clipped gradients.")
        if not isinstance(result, (list, tuple)) or [g.shape for g in result] != [g.shape for g in long]:
            raise Hint("Return a list with one tensor for each gradient, in the same shapes.")
        parameters = [nn.Parameter(torch.zeros_like(g)) for g in long]
        for parameter, g in zip(parameters, long, strict=True):
            parameter.grad = g.clone()
        norm = nn.utils.clip_grad_norm_(parameters, 2.0)
        right = [p.grad for p in parameters if p.grad is not None]
        norms = [g.norm() for g in long]
        each = [g * min(1.0, 2.0 / n) for g, n in zip(long, norms, strict=True)]
        mistakes = {
            "It clips each tensor by its own norm, which changes the direction: take one norm, over all tensors.": each,
            "It cuts off single entries: scale all tensors by one factor.": [g.clamp(-2.0, 2.0) for g in long],
            "It adds up the tensors' norms: add up squares, take the root.": [g * 2.0 / sum(norms) for g in long],
            "The norm is squared: take the root of the sum of squares.": [g * 2.0 / norm**2 for g in long],
            "The factor is upside down: multiply by max_norm / norm.": [g * norm / 2.0 for g in long],
            "It scales to norm 1: the norm that is allowed is `max_norm`.": [g / norm for g in long],
            "Nothing is clipped: the norm of all gradients is above `max_norm` here.": long,
        }
        entry = f"Our first entry should be {right[0][0, 0]:.3f}, and it is {result[0][0, 0]:.3f}."
        _raise_hint(result, right, mistakes, entry)
        if not _close(small, short):
            raise Hint("Gradients with a norm below `max_norm` are to stay as they are; it scales them up.")

    check(answer, test, "One factor for all, so the direction stays and only the length is limited.")


def adamw_update(answer: Callable[..., Moments]) -> None:
    """Check `adamw_update(weight, gradient, m, v, t, lr, weight_decay)` against three steps of torch.optim.AdamW."""

    def test() -> None:
        start = torch.tensor([2.0, -1.0, 0.5, 3.0, 1.0])
        # The second weight has no gradient at first; that of the last is so small that epsilon's place shows.
        gradients = list(torch.tensor([[1.0, 0.0, -0.1, 4.0, 1e-6], [-2.0, 0.0, 0.3, 4.0, 2e-6], [1.0] * 4 + [1e-6]]))
        parameter = nn.Parameter(start.clone())
        optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.5)
        right = []
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
            right.append(parameter.detach().clone())
        mistakes = {
            "no decay": "The decay is missing: the weight also shrinks by lr * decay * weight.",
            "L2": "The decay goes through the gradient (Adam with L2); AdamW shrinks the weight itself.",
            "no rate": "The decay is not multiplied by the learning rate.",
            "late": "The decay shrinks the weight after its step: take a share of the weight before the update.",
            "uncorrected": "m and v start at zero and are too small at first: divide by 1 - beta1**t and 1 - beta2**t.",
            "v uncorrected": "m is corrected for its start at zero, and v is not.",
            "m uncorrected": "v is corrected for its start at zero, and m is not.",
            "corrected kept": "It returns the corrected means: return m and v, the correction is for this step only.",
            "not squared": "v is the mean of the squared gradients: square them.",
            "no root": "Divide by the square root of v.",
            "no epsilon": "A weight without a gradient became NaN (0 / 0): add epsilon to the root.",
            "epsilon inside": "epsilon stands inside the root, and outweighs a small gradient: add it to the root.",
            "epsilon early": "epsilon is added before v is corrected: add it to the root of the corrected v.",
            "uphill": "It moves along the gradient: subtract.",
            "betas": "beta1 and beta2 are swapped: m has 0.9 and v has 0.999.",
        }
        weight, m, v, results = start.clone(), torch.zeros_like(start), torch.zeros_like(start), []
        for t, gradient in enumerate(gradients, start=1):
            returned = answer(weight.clone(), gradient.clone(), m.clone(), v.clone(), t, 0.1, 0.5)
            if not isinstance(returned, tuple) or len(returned) != 3:
                raise Hint("Return three tensors: the new weight, m and v.")
            weight, m, v = returned
            results.append(weight.detach())
        if any(result.shape != start.shape for result in results):
            raise Hint("The new weight has another shape than the weight.")
        close = torch.isclose(torch.stack(results), torch.stack(right), rtol=1e-4, atol=1e-6)
        for t, i in (~close).nonzero().tolist():  # the first raises
            entry = f"After update {t + 1} weight {i} should be {right[t][i]:.4f}, and it is {results[t][i]:.4f}."
            _raise_hint(results, right, {h: _adamw(name, start, gradients) for name, h in mistakes.items()}, entry)

    check(answer, test, "Three updates equal to torch.optim.AdamW's, decay and all.")


def fp16_update(answer: Callable[..., None]) -> None:
    """Check `fp16_update(loss, parameters, optimizer, scaler, max_norm)` with a real GradScaler, on the CPU."""

    def test() -> None:
        gradient = torch.tensor([3.0, -4.0])
        weight, scaler, optimizer = _scaled_set_up()
        loss = (weight * gradient).sum()
        factors: list[float] = []  # of the gradient that each backward starts from
        loss.register_hook(lambda factor: factors.append(float(factor)))
        not_scaled = Hint("The loss is not scaled before backward: call scaler.scale(loss).backward().")
        too_late = Hint("scaler.unscale_(optimizer) comes after the step: call it before, and clip after it.")
        try:
            answer(loss, [weight], optimizer, scaler, 1.0)
        except RuntimeError:  # the scaler's own, where its methods are called in another order than it allows
            if "step" in scaler.calls and scaler.calls[-1] == "unscale_":
                raise too_late from None
            raise
        except AssertionError:  # torch's own, by which it notices a missing call
            raise (not_scaled if "scale" not in scaler.calls else Hint(NO_GRADIENTS)) from None
        calls, moved = scaler.calls, -weight.detach()
        if "scale" not in calls:
            raise not_scaled
        if factors == [1.0]:
            raise Hint("scale returns the scaled loss and leaves `loss` alone: call backward on what it returns.")
        if "step" not in calls:
            anyway = moved.isfinite().all() and moved.any()
            what = "It calls optimizer.step(), which also steps on inf" if anyway else "No step is taken"
            raise Hint(f"{what}: call scaler.step(optimizer).")
        if "update" not in calls:
            raise Hint("scaler.update() is missing: without it the scale is never lowered after an overflow.")
        if calls.index("update") < calls.index("step"):
            raise Hint("scaler.update() comes after scaler.step(optimizer): it looks at what that step found.")
        if not moved.any():
            raise Hint(NO_GRADIENTS)
        if "unscale_" in calls[calls.index("step") :]:
            raise too_late
        if torch.allclose(moved, gradient):
            raise Hint("The gradient is not clipped before the step: its norm is 5 and max_norm is 1.")
        if torch.allclose(moved, 2 * gradient / 5):
            raise Hint("It steps twice: scaler.step(optimizer) calls optimizer.step() already.")
        if not torch.allclose(moved, gradient / 5):
            raise Hint("It clips the scaled gradients: call scaler.unscale_(optimizer) before clipping.")
        if weight.grad is not None and weight.grad.any():
            raise Hint("The gradients are left over for the next update: call optimizer.zero_grad() at the end.")
        weight, scaler, optimizer = _scaled_set_up()
        answer((weight * torch.tensor([math.inf, 1.0])).sum(), [weight], optimizer, scaler, 1.0)
        if weight.any():
            raise Hint("With a gradient of inf the weights have changed: only scaler.step may take the step.")

    check(answer, test, "Scale, backward, unscale, clip, step, update; and a step with inf in it is left out.")


class _WatchedScaler(torch.amp.GradScaler):
    """A GradScaler that notes which of its methods are called."""

    def __init__(self) -> None:
        super().__init__("cpu", init_scale=1024.0)
        self.calls: list[str] = []

    def scale(self, outputs: Tensor) -> Tensor:
        self.calls.append("scale")
        return super().scale(outputs)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        self.calls.append("unscale_")
        super().unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, *args: object, **options: object) -> float | None:
        result = super().step(optimizer, *args, **options)
        self.calls.append("step")  # after the unscale_ that a step may call itself
        return result

    def update(self, new_scale: float | Tensor | None = None) -> None:
        self.calls.append("update")
        super().update(new_scale)


def _scaled_set_up() -> tuple[nn.Parameter, _WatchedScaler, torch.optim.Optimizer]:
    """A weight of zeros that SGD with rate 1 moves by exactly its gradient."""
    weight = nn.Parameter(torch.zeros(2))
    return weight, _WatchedScaler(), torch.optim.SGD([weight], lr=1.0)


def _library_factors(warmup: int, updates: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=warmup, num_training_steps=updates)
    return [scheduler.lr_lambdas[0](update) for update in range(updates)]


def _adamw(mistake: str, weight: Tensor, gradients: list[Tensor]) -> list[Tensor]:
    """The weights after each update of an AdamW with this mistake, at lr 0.1 and decay 0.5."""
    beta1, beta2 = (0.999, 0.9) if mistake == "betas" else (0.9, 0.999)
    shrink = {"no decay": 0.0, "L2": 0.0, "late": 0.0, "no rate": 0.5}.get(mistake, 0.05)
    m, v, weights = torch.zeros_like(weight), torch.zeros_like(weight), []
    for t, gradient in enumerate(gradients, start=1):
        g = gradient + 0.5 * weight if mistake == "L2" else gradient
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * (g if mistake == "not squared" else g**2)
        m_hat = m if mistake in ("uncorrected", "m uncorrected") else m / (1 - beta1**t)
        v_hat = v if mistake in ("uncorrected", "v uncorrected") else v / (1 - beta2**t)
        below = {
            "no root": v_hat + 1e-8,
            "no epsilon": v_hat**0.5,
            "epsilon inside": (v_hat + 1e-8) ** 0.5,
            "epsilon early": (v**0.5 + 1e-8) / (1 - beta2**t) ** 0.5,
        }.get(mistake, v_hat**0.5 + 1e-8)
        step = 0.1 * m_hat / below
        weight = weight * (1 - shrink) + (step if mistake == "uphill" else -step)
        weight = weight * 0.95 if mistake == "late" else weight
        m, v = (m_hat, v_hat) if mistake == "corrected kept" else (m, v)
        weights.append(weight)
    return weights


def _number(value: float) -> float:
    if value is None:
        raise Hint("It returns None; return a number.")
    return float(value)


def _close(result: list[Tensor] | list[float], other: list[Tensor] | list[float]) -> bool:
    flat = [
        torch.cat([torch.as_tensor(x, dtype=torch.float64).detach().flatten() for x in xs]) for xs in (result, other)
    ]
    return flat[0].shape == flat[1].shape and torch.allclose(*flat, rtol=1e-4, atol=1e-6, equal_nan=True)


def _raise_hint(result: list[Tensor], right: list[Tensor], mistakes: dict[str, list[Tensor]], otherwise: str) -> None:
    """Raise the hint of the mistake whose result this is, or `otherwise`, unless the result is right."""
    if not _close(result, right):
        raise Hint(next((hint for hint, wrong in mistakes.items() if _close(result, wrong)), otherwise))
