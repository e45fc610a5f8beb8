"""The exercises of notebook 04_training_loops: a right answer, and the likely wrong ones, each with its hint.

The right answers are the libraries' own: torch's AdamW, clipping and GradScaler, transformers' schedule.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from helpers.checks.base import Answer, Exercise, Hint

import torch
from torch import Tensor, nn
from transformers import get_scheduler


def _torch_adamw(
    weight: Tensor, gradient: Tensor, m: Tensor, v: Tensor, t: int, lr: float, decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    parameter = nn.Parameter(weight.clone())
    parameter.grad = gradient
    optimizer = torch.optim.AdamW([parameter], lr=lr, weight_decay=decay)
    state = {"step": torch.tensor(t - 1.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    optimizer.state[parameter] = state
    optimizer.step()
    return parameter.detach(), state["exp_avg"], state["exp_avg_sq"]


def _three_updates() -> list[tuple[Any, ...]]:
    # The second weight has no gradient at first; that of the last is so small that epsilon's place shows.
    gradients = [[1.0, 0.0, -0.1, 4.0, 1e-6], [-2.0, 0.0, 0.3, 4.0, 2e-6], [1.0] * 4 + [1e-6]]
    weight = torch.tensor([2.0, -1.0, 0.5, 3.0, 1.0], dtype=torch.float64)
    cases, m, v = [], torch.zeros_like(weight), torch.zeros_like(weight)
    for t, gradient in enumerate(gradients, start=1):
        cases.append((weight, torch.tensor(gradient, dtype=torch.float64), m, v, t, 0.1, 0.5))
        weight, m, v = _torch_adamw(*cases[-1])
    return cases


def _adamw(
    through: Answer = lambda g, w, decay: g, betas: tuple[float, float] = (0.9, 0.999), square: Answer = torch.square,
    correct_m: int = 1, correct_v: int = 1, below: Answer = lambda v, v_hat, c: v_hat.sqrt() + 1e-8, sign: int = -1,
    shrunk: Answer = lambda w, lr, decay: w * (1 - lr * decay), late: Answer = lambda w, lr, decay: w,
    kept: Answer = lambda m, v, m_hat, v_hat: (m, v),
) -> Answer:  # fmt: skip
    """Return an AdamW update in which a part is exchanged."""

    def function(
        weight: Tensor, gradient: Tensor, m: Tensor, v: Tensor, t: int, lr: float, decay: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        g = through(gradient, weight, decay)
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * square(g)
        c = 1 - betas[1] ** t
        m_hat, v_hat = m / (1 - betas[0] ** t) ** correct_m, v / c**correct_v
        weight = late(shrunk(weight, lr, decay) + sign * lr * m_hat / below(v, v_hat, c), lr, decay)
        return weight, *kept(m, v, m_hat, v_hat)

    return function


def _first_difference(*case: Any) -> str:
    *given, found, right = case
    for name, x, y in zip(("weight", "m", "v"), found, right, strict=True):
        for i in (~torch.isclose(x.double(), y, rtol=1e-5)).nonzero().flatten().tolist():
            return f"After update {given[4]} {name} {i} should be {y[i]:.4f}, and it is {x[i]:.4f}."
    raise AssertionError("they are the same")


adamw_update = Exercise(
    right=_torch_adamw,
    cases=_three_updates(),
    run=lambda answer, *case: answer(*copy.deepcopy(case)),  # which it may change
    mistakes={
        "The decay is missing: the weight also shrinks by lr * decay * weight.": _adamw(shrunk=lambda w, lr, decay: w),
        "The decay goes through the gradient (Adam with L2); AdamW shrinks the weight itself.":
            _adamw(through=lambda g, w, decay: g + decay * w, shrunk=lambda w, lr, decay: w),
        "The decay is not multiplied by the learning rate.": _adamw(shrunk=lambda w, lr, decay: w * (1 - decay)),
        "The decay shrinks the weight after its step: take a share of the weight before the update.":
            _adamw(shrunk=lambda w, lr, decay: w, late=lambda w, lr, decay: w * (1 - lr * decay)),
        "m and v start at zero and are too small at first: divide by 1 - beta1**t and 1 - beta2**t.":
            _adamw(correct_m=0, correct_v=0),
        "m is corrected for its start at zero, and v is not.": _adamw(correct_v=0),
        "v is corrected for its start at zero, and m is not.": _adamw(correct_m=0),
        "It returns the corrected means: return m and v, the correction is for this step only.":
            _adamw(kept=lambda m, v, m_hat, v_hat: (m_hat, v_hat)),
        "v is the mean of the squared gradients: square them.": _adamw(square=lambda g: g),
        "Divide by the square root of v.": _adamw(below=lambda v, v_hat, c: v_hat + 1e-8),
        "A weight without a gradient became NaN (0 / 0): add epsilon to the root.":
            _adamw(below=lambda v, v_hat, c: v_hat.sqrt()),
        "epsilon stands inside the root, and outweighs a small gradient: add it to the root.":
            _adamw(below=lambda v, v_hat, c: (v_hat + 1e-8).sqrt()),
        "epsilon is added before v is corrected: add it to the root of the corrected v.":
            _adamw(below=lambda v, v_hat, c: (v.sqrt() + 1e-8) / c**0.5),
        "It moves along the gradient: subtract.": _adamw(sign=1),
        "beta1 and beta2 are swapped: m has 0.9 and v has 0.999.": _adamw(betas=(0.999, 0.9)),
    },
    returns="three tensors of the weight's shape: the new weight, m and v",
    otherwise=_first_difference,
    learned="Three updates equal to torch.optim.AdamW's, decay and all.",
)  # fmt: skip


def _norm(gradients: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients]).norm()


def _torch_clip(gradients: list[Tensor], max_norm: float) -> tuple[Tensor, ...]:
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for parameter, g in zip(parameters, gradients, strict=True):
        parameter.grad = g.clone()
    nn.utils.clip_grad_norm_(parameters, max_norm)
    return tuple(p.grad for p in parameters if p.grad is not None)


def _times(factor: Answer) -> Answer:
    """Return an answer that multiplies each gradient by a factor of it, of all, and of the norm that is allowed."""
    return lambda gradients, max_norm: [g * factor(g, gradients, max_norm) for g in gradients]


LONG = [torch.tensor([[3.0, -4.0], [0.5, 0.25]]), torch.tensor([12.0, 0.1, -2.0])]


def _short_ones_stay(answer: Answer) -> None:
    short = [g / 100 for g in LONG]
    if not all(map(torch.allclose, answer([g.clone() for g in short], 2.0), short)):
        raise Hint("Gradients with a norm below `max_norm` are to stay as they are; it scales them up.")


clip_gradients = Exercise(
    right=_torch_clip,
    cases=[(LONG, 2.0)],
    run=lambda answer, *case: answer(*copy.deepcopy(case)),  # which it may change
    mistakes={
        "It clips each tensor by its own norm, which changes the direction: take one norm, over all tensors.":
            _times(lambda g, all_of_them, n: min(1.0, n / g.norm())),
        "It cuts off single entries: scale all tensors by one factor.": lambda gs, n: [g.clamp(-n, n) for g in gs],
        "It adds up the tensors' norms: add up squares, take the root.":
            _times(lambda g, gs, n: n / sum(each.norm() for each in gs)),
        "The norm is squared: take the root of the sum of squares.": _times(lambda g, gs, n: n / _norm(gs) ** 2),
        "The factor is upside down: multiply by max_norm / norm.": _times(lambda g, gs, n: _norm(gs) / n),
        "It scales to norm 1: the norm that is allowed is `max_norm`.": _times(lambda g, gs, n: 1 / _norm(gs)),
        "Nothing is clipped: the norm of all gradients is above `max_norm` here.": lambda gs, n: gs,
    },
    returns="a list with one tensor for each gradient, in the same shapes",
    otherwise=lambda gs, n, found, right:
        f"Our first entry should be {right[0][0, 0]:.3f}, and it is {found[0][0, 0]:.3f}.",
    further=[_short_ones_stay],
    learned="One factor for all, so the direction stays and only the length is limited.",
)  # fmt: skip


@functools.cache
def _schedule(warmup: int, updates: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=warmup, num_training_steps=updates)
    return [scheduler.lr_lambdas[0](update) for update in range(updates + 1)]


def _half(x: float) -> float:
    """The falling half period of a cosine, from 1 at x = 0 to 0 at x = 1."""
    return (1 + math.cos(math.pi * x)) / 2


def _cosine(shape: Answer = lambda i, w, n: _half(i / (n - w)), warm: Answer = lambda i, w: i / w) -> Answer:
    """Return an answer with a warm-up and a shape, of the updates since then, those of the warm-up, and all."""
    return lambda update, warmup, updates: (
        warm(update, warmup) if update < warmup else shape(update - warmup, warmup, updates)
    )


cosine_factor = Exercise(
    right=lambda update, warmup, updates: _schedule(warmup, updates)[update],
    cases=[(update, warmup, n) for warmup, n in ((5, 40), (10, 30), (1, 12)) for update in range(n)],
    mistakes={
        "The warm-up is missing: let it rise from 0 to 1 first.": _cosine(warm=lambda i, w: 1.0),
        "It is one update ahead: updates are counted from 0, and update 0 has the factor 0.":
            lambda update, warmup, updates: _cosine()(update + 1, warmup, updates),
        "The warm-up is one update ahead: update 0 has the factor 0.": _cosine(warm=lambda i, w: (i + 1) / w),
        "It reaches 0 one update too early: divide by `updates - warmup`.":
            _cosine(lambda i, w, n: _half(i / (n - w - 1))),
        "The cosine starts at update 0: let it start at 1 where the warm-up ends.":
            _cosine(lambda i, w, n: _half((i + w) / n)),
        "After the warm-up `updates - warmup` are left: stretch the cosine over those.":
            _cosine(lambda i, w, n: _half(i / n)),
        "This falls in a straight line: that is the linear schedule.": _cosine(lambda i, w, n: 1 - i / (n - w)),
        "This is a full period, down and up again: take half a period, (1 + cos(pi x)) / 2.":
            _cosine(lambda i, w, n: _half(2 * i / (n - w))),
        "This is a quarter of a cosine: take half a period, (1 + cos(pi x)) / 2.":
            _cosine(lambda i, w, n: math.cos(math.pi / 2 * i / (n - w))),
        "cos(pi x) runs from 1 to -1, no rate is negative: take (1 + cos(pi x)) / 2.":
            _cosine(lambda i, w, n: math.cos(math.pi * i / (n - w))),
        "math.cos takes radians: half a period is pi, not 180.":
            _cosine(lambda i, w, n: (1 + math.cos(180 * i / (n - w))) / 2),
    },
    returns="a number",
    otherwise=lambda update, warmup, updates, found, right:
        f"For update={update}, warmup={warmup}, updates={updates} the factor is {right:.4f}, and it says {found:.4f}.",
    learned="This is the schedule that get_scheduler('cosine', …) makes, update for update.",
)  # fmt: skip


def _noted(name: str) -> Answer:
    def method(self: _WatchedScaler, *arguments: Any) -> Any:
        try:
            return getattr(torch.amp.GradScaler, name)(self, *arguments)
        finally:
            self.calls.append(name)  # a step after the unscale_ that it may call itself

    return method


class _WatchedScaler(torch.amp.GradScaler):
    """A GradScaler that notes in `calls` which of its methods are called."""

    scale, unscale_, step, update = map(_noted, ("scale", "unscale_", "step", "update"))


def _fp16(stations: str) -> Answer:
    """Return an answer that calls these in this order."""

    def function(
        loss: Tensor, parameters: list[Tensor], optimizer: torch.optim.Optimizer, scaler: _WatchedScaler, norm: float
    ) -> None:
        calls: dict[str, Callable[[], object]] = {
            "scale": lambda: scaler.scale(loss),
            "backward": lambda: scaler.scale(loss).backward(),
            "loss.backward": lambda: loss.backward(),
            "unscale": lambda: scaler.unscale_(optimizer),
            "clip": lambda: nn.utils.clip_grad_norm_(parameters, norm),
            "step": lambda: scaler.step(optimizer),
            "optimizer.step": lambda: optimizer.step(),
            "step_on_inf": lambda: (
                all(p.grad.isfinite().all() for p in parameters if p.grad is not None) or optimizer.step()
            ),
            "update": lambda: scaler.update(),
            "zero": lambda: optimizer.zero_grad(),
        }
        for station in stations.split():
            calls[station]()

    return function


# Each hint with what shows the mistake (in a trace of calls, backward's factors, the move, an error) and answers.
FP16: dict[str, tuple[Callable[[SimpleNamespace], Any], list[str]]] = {
    "The loss is not scaled before backward: call scaler.scale(loss).backward().": (
        lambda t: "scale" not in t.calls,
        ["loss.backward unscale clip step update zero", "loss.backward clip optimizer.step zero", ""]),
    "The step finds no gradients: call backward before it, and clear the gradients after it.": (
        lambda t: isinstance(t.error, AssertionError) or ("step" in t.calls and not t.inf and not t.moved.any()),
        ["backward unscale zero clip step update", "zero backward zero step update"]),
    "scaler.unscale_(optimizer) comes after the step: call it before, and clip after it.": (
        lambda t: "unscale_" in t.calls[t.step :],
        ["backward step unscale clip update zero", "backward step update unscale clip zero"]),
    "scale returns the scaled loss and leaves `loss` alone: call backward on what it returns.": (
        lambda t: t.factors == [1.0],
        ["scale loss.backward unscale clip step update zero", "scale loss.backward clip step update zero"]),
    "It calls optimizer.step(), which also steps on inf: call scaler.step(optimizer).": (
        lambda t: "step" not in t.calls and t.moved.isfinite().all() and t.moved.any(),
        ["backward unscale clip optimizer.step update zero"]),
    "No step is taken: call scaler.step(optimizer).": (
        lambda t: "step" not in t.calls, ["backward unscale clip update zero"]),
    "scaler.update() is missing: without it the scale is never lowered after an overflow.": (
        lambda t: "update" not in t.calls, ["backward unscale clip step zero"]),
    "scaler.update() comes after scaler.step(optimizer): it looks at what that step found.": (
        lambda t: "update" in t.calls[: t.step], ["backward unscale clip update step zero"]),
    "The gradient is not clipped before the step: its norm is 5 and max_norm is 1.": (
        lambda t: torch.allclose(t.moved, t.gradient),
        ["backward unscale step update zero", "backward step update zero", "backward unscale step clip update zero"]),
    "It steps twice: scaler.step(optimizer) calls optimizer.step() already.": (
        lambda t: torch.allclose(t.moved, 2 * t.gradient / 5),
        ["backward unscale clip step optimizer.step update zero"]),
    "It clips the scaled gradients: call scaler.unscale_(optimizer) before clipping.": (
        lambda t: not t.inf and not torch.allclose(t.moved, t.gradient / 5),
        ["backward clip step update zero", "backward clip unscale step update zero"]),
    "The gradients are left over for the next update: call optimizer.zero_grad() at the end.": (
        lambda t: not t.inf and t.left, ["backward unscale clip step update"]),
    "With a gradient of inf the weights have changed: only scaler.step may take the step.": (
        lambda t: t.inf and t.moved.any(), ["backward unscale clip step step_on_inf update zero"]),
}  # fmt: skip


def _watch(answer: Answer, gradient: Tensor) -> None:
    """Update two zeros by SGD with rate 1, which moves them by exactly their gradient, and raise the hint for it."""
    weight, scaler = nn.Parameter(torch.zeros(2)), _WatchedScaler("cpu", init_scale=1024.0)
    scaler.calls = list[str]()
    trace = SimpleNamespace(gradient=gradient, inf=not gradient.isfinite().all(), calls=scaler.calls, error=None)
    optimizer, loss, trace.factors = torch.optim.SGD([weight], lr=1.0), (weight * gradient).sum(), []
    loss.register_hook(lambda factor: trace.factors.append(float(factor)))  # what each backward starts from
    try:
        answer(loss, [weight], optimizer, scaler, 1.0)
    except (AssertionError, RuntimeError) as error:  # torch's own: a call is missing, or in an order it does not allow
        trace.error = error
    trace.moved, trace.left = -weight.detach(), weight.grad is not None and weight.grad.any()
    trace.step = trace.calls.index("step") if "step" in trace.calls else len(trace.calls)
    if isinstance(trace.error, RuntimeError) and "unscale_" not in trace.calls[trace.step :]:
        raise trace.error
    for hint, (shows, _) in FP16.items():
        if shows(trace):
            raise Hint(hint)


fp16_update = Exercise(
    right=_fp16("backward unscale clip step update zero"),
    cases=[(torch.tensor([3.0, -4.0]),), (torch.tensor([math.inf, 1.0]),)],
    run=_watch,
    mistakes={hint: [_fp16(stations) for stations in answers] for hint, (_, answers) in FP16.items()},
    learned="Scale, backward, unscale, clip, step, update; and a step with inf in it is left out.",
)  # fmt: skip
