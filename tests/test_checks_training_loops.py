"""The checks of notebook 04: the solution passes, the stub does not, and each mistake gets its hint."""

import math
from functools import partial

from helpers.checks import training_loops as checks

import torch
from exercises import exercise_functions, exercise_tests, said
from torch import nn

STUBS, SOLUTIONS = exercise_functions("04_training_loops")
_said = partial(said, checks)


def _nothing(*arguments):
    return None


# cosine_factor(update, warmup, updates)


def _cosine(shape, warm=lambda i, warmup: i / warmup):
    def cosine_factor(update, warmup, updates):
        if update < warmup:
            return warm(update, warmup)
        return shape(update, warmup, updates)

    return cosine_factor


def _half(x):
    return (1 + math.cos(math.pi * x)) / 2


def _right_shape(i, w, n):
    return _half((i - w) / (n - w))


def _ahead(update, warmup, updates):
    return _cosine(_right_shape)(update + 1, warmup, updates)


# clip_gradients(gradients, max_norm)


def _norm(gradients):
    return math.sqrt(sum(float(g.square().sum()) for g in gradients))


def _clip(factor):
    return lambda gradients, max_norm: [g * factor(g, gradients, max_norm) for g in gradients]


def _in_place(gradients, max_norm):
    for g in gradients:
        g *= min(1, max_norm / _norm(gradients))


def _one_vector(gradients, max_norm):
    return torch.cat([g.flatten() for g in gradients])


# adamw_update(weight, gradient, m, v, t, lr, decay)


def _adamw(
    decayed=lambda w, lr, decay: w * (1 - lr * decay),
    through=lambda g, w, decay: g,
    betas=(0.9, 0.999),
    corrected=(True, True),
    square=lambda g: g**2,
    root=torch.sqrt,
    below=lambda v, v_hat, root, correction: root(v_hat) + 1e-8,
    sign=-1,
    result=lambda w, m, v, m_hat, v_hat: (w, m, v),
):
    def adamw_update(weight, gradient, m, v, t, lr, decay):
        g = through(gradient, weight, decay)
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * square(g)
        m_hat = m / (1 - betas[0] ** t) if corrected[0] else m
        v_hat = v / (1 - betas[1] ** t) if corrected[1] else v
        step = sign * lr * m_hat / below(v, v_hat, root, 1 - betas[1] ** t)
        return result(decayed(weight, lr, decay) + step, m, v, m_hat, v_hat)

    return adamw_update


def _no_decay(w, lr, decay):
    return w


def _late_decay(weight, gradient, m, v, t, lr, decay):
    new, m, v = _adamw(_no_decay)(weight, gradient, m, v, t, lr, decay)
    return new * (1 - lr * decay), m, v


# fp16_update(loss, parameters, optimizer, scaler, max_norm)


def _fp16(*stations):
    """An update that calls these stations in this order."""

    def fp16_update(loss, parameters, optimizer, scaler, max_norm):
        calls = {
            "backward": lambda: scaler.scale(loss).backward(),
            "plain backward": lambda: loss.backward(),
            "scale": lambda: scaler.scale(loss),
            "unscale": lambda: scaler.unscale_(optimizer),
            "clip": lambda: nn.utils.clip_grad_norm_(parameters, max_norm),
            "step": lambda: scaler.step(optimizer),
            "plain step": lambda: optimizer.step(),
            "update": lambda: scaler.update(),
            "zero": lambda: optimizer.zero_grad(),
        }
        for station in stations:
            calls[station]()

    return fp16_update


WRONG = [
    ("cosine_factor", _cosine(_right_shape, warm=lambda i, w: 1.0), "The warm-up is missing"),
    ("cosine_factor", _cosine(lambda i, w, n: _half(i / n)), "The cosine starts at update 0"),
    ("cosine_factor", _cosine(lambda i, w, n: _half((i - w) / n)), "stretch the cosine over those"),
    ("cosine_factor", _cosine(lambda i, w, n: (n - i) / (n - w)), "that is the linear schedule"),
    ("cosine_factor", _cosine(lambda i, w, n: math.cos(math.pi / 2 * (i - w) / (n - w))), "a quarter of a cosine"),
    ("cosine_factor", _cosine(lambda i, w, n: math.cos(math.pi * (i - w) / (n - w))), "runs from 1 to -1"),
    ("cosine_factor", _cosine(lambda i, w, n: (1 + math.cos(180 * (i - w) / (n - w))) / 2), "takes radians"),
    ("cosine_factor", _ahead, "It is one update ahead"),
    ("cosine_factor", _cosine(_right_shape, warm=lambda i, w: (i + 1) / w), "The warm-up is one update ahead"),
    ("cosine_factor", _cosine(lambda i, w, n: _half((i - w) / (n - w - 1))), "one update too early"),
    ("cosine_factor", _cosine(lambda i, w, n: _half(2 * (i - w) / (n - w))), "a full period"),
    (
        "cosine_factor",
        lambda i, w, n: 5e-3 * _cosine(_right_shape)(i, w, n),
        "is 0.2000, and it says 0.0010",
    ),
    ("cosine_factor", _nothing, "returns None"),
    ("cosine_factor", lambda i, w, n: torch.tensor(2.0), "the factor is 0.0000, and it says 2.0000"),
    ("clip_gradients", _clip(lambda g, gs, n: min(1, n / float(g.norm()))), "clips each tensor by its own norm"),
    ("clip_gradients", lambda gs, n: [g.clamp(-n, n) for g in gs], "cuts off single entries"),
    (
        "clip_gradients",
        _clip(lambda g, gs, n: n / sum(float(x.norm()) for x in gs)),
        "adds up the tensors' norms",
    ),
    ("clip_gradients", _clip(lambda g, gs, n: min(1, n / _norm(gs) ** 2)), "The norm is squared"),
    ("clip_gradients", _clip(lambda g, gs, n: _norm(gs) / n), "upside down"),
    ("clip_gradients", _clip(lambda g, gs, n: 1 / _norm(gs)), "scales to norm 1"),
    ("clip_gradients", _clip(lambda g, gs, n: max(1, n / _norm(gs))), "Nothing is clipped"),
    ("clip_gradients", _clip(lambda g, gs, n: n / _norm(gs)), "it scales them up"),
    ("clip_gradients", _clip(lambda g, gs, n: 0.5), "Our first entry should be"),
    ("clip_gradients", _in_place, "returns None"),
    ("clip_gradients", _one_vector, "a list with one tensor for each gradient"),
    ("adamw_update", _adamw(decayed=_no_decay), "The decay is missing"),
    ("adamw_update", _adamw(_no_decay, through=lambda g, w, decay: g + decay * w), "goes through the gradient"),
    ("adamw_update", _adamw(lambda w, lr, decay: w * (1 - decay)), "not multiplied by the learning rate"),
    ("adamw_update", _adamw(corrected=(False, False)), "too small at first"),
    ("adamw_update", _adamw(corrected=(True, False)), "v is not"),
    ("adamw_update", _adamw(corrected=(False, True)), "m is not"),
    ("adamw_update", _adamw(square=lambda g: g), "square them"),
    ("adamw_update", _adamw(root=lambda v: v), "Divide by the square root of v"),
    ("adamw_update", _adamw(sign=1), "It moves along the gradient"),
    ("adamw_update", _adamw(betas=(0.999, 0.9)), "beta1 and beta2 are swapped"),
    ("adamw_update", _late_decay, "shrinks the weight after its step"),
    ("adamw_update", _adamw(below=lambda v, v_hat, root, c: root(v_hat)), "add epsilon to the root"),
    ("adamw_update", _adamw(below=lambda v, v_hat, root, c: root(v_hat + 1e-8)), "epsilon stands inside the root"),
    ("adamw_update", _adamw(below=lambda v, v_hat, root, c: (root(v) + 1e-8) / c**0.5), "before v is corrected"),
    ("adamw_update", _adamw(below=lambda v, v_hat, root, c: root(v_hat) + 1e-6), "After update 1 weight 4 should be"),
    ("adamw_update", _adamw(result=lambda w, m, v, m_hat, v_hat: (w, m_hat, v_hat)), "returns the corrected means"),
    ("adamw_update", _adamw(sign=-2), "After update 1 weight 0 should be 1.8000, and it is 1.7000"),
    ("adamw_update", _adamw(result=lambda w, m, v, *hats: w), "Return three tensors"),
    ("adamw_update", _adamw(result=lambda w, m, v, *hats: (w.sum(), m, v)), "another shape"),
    ("adamw_update", _nothing, "Return three tensors"),
    ("fp16_update", _fp16("plain backward", "unscale", "clip", "step", "update", "zero"), "The loss is not scaled"),
    ("fp16_update", _fp16("backward", "unscale", "clip", "plain step", "update", "zero"), "which also steps on inf"),
    ("fp16_update", _fp16("backward", "unscale", "clip", "update", "zero"), "No step is taken"),
    ("fp16_update", _fp16("backward", "unscale", "clip", "step", "zero"), "scaler.update() is missing"),
    ("fp16_update", _fp16("backward", "unscale", "clip", "update", "step", "zero"), "comes after scaler.step"),
    ("fp16_update", _fp16("backward", "unscale", "step", "update", "zero"), "The gradient is not clipped"),
    ("fp16_update", _fp16("backward", "step", "update", "zero"), "The gradient is not clipped"),
    ("fp16_update", _fp16("backward", "unscale", "zero", "clip", "step", "update"), "The step finds no gradients"),
    ("fp16_update", _fp16("backward", "clip", "step", "update", "zero"), "clips the scaled gradients"),
    ("fp16_update", _fp16("scale", "plain backward", "unscale", "clip", "step", "update", "zero"), "what it returns"),
    ("fp16_update", _fp16("scale", "plain backward", "clip", "step", "update", "zero"), "what it returns"),
    ("fp16_update", _fp16("backward", "step", "unscale", "clip", "update", "zero"), "comes after the step"),
    ("fp16_update", _fp16("backward", "step", "update", "unscale", "clip", "zero"), "comes after the step"),
    ("fp16_update", _fp16("backward", "clip", "step", "update", "unscale", "zero"), "comes after the step"),
    ("fp16_update", _fp16("backward", "unscale", "step", "clip", "update", "zero"), "not clipped before the step"),
    ("fp16_update", _fp16("backward", "clip", "unscale", "step", "update", "zero"), "clips the scaled gradients"),
    ("fp16_update", _fp16("backward", "unscale", "clip", "step", "plain step", "update", "zero"), "It steps twice"),
    ("fp16_update", _fp16("backward", "unscale", "clip", "step", "update"), "left over for the next update"),
    ("fp16_update", _fp16("zero", "backward", "zero", "step", "update"), "The step finds no gradients"),
    ("fp16_update", _nothing, "The loss is not scaled"),
]


test_the_solution_passes_and_the_stub_does_not, test_a_mistake_gets_its_hint = exercise_tests(
    checks, STUBS, SOLUTIONS, WRONG
)


def test_other_right_answers_pass(capsys):
    def clip_with_torch(gradients, max_norm):
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        for g in gradients:  # changing what one was given is allowed
            g.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        return gradients

    def adamw_decay_last(weight, gradient, m, v, t, lr, decay):
        new, m, v = SOLUTIONS["adamw_update"](weight, gradient, m, v, t, lr, 0.0)
        return new - lr * decay * weight, m, v

    for name, function in (
        ("cosine_factor", lambda i, w, n: torch.tensor(SOLUTIONS["cosine_factor"](i, w, n))),
        ("clip_gradients", clip_with_torch),
        ("adamw_update", adamw_decay_last),
        ("fp16_update", _fp16("zero", "backward", "unscale", "clip", "step", "update", "zero")),
    ):
        assert ": correct." in _said(capsys, name, function)


def test_a_step_that_the_scaler_would_leave_out_is_noticed(capsys):
    def steps_anyway(loss, parameters, optimizer, scaler, max_norm):
        _fp16("backward", "unscale", "clip", "step", "update")(loss, parameters, optimizer, scaler, max_norm)
        if not torch.isfinite(loss.grad_fn(torch.tensor(1.0))[0]).all():
            parameters[0].data += 1.0
        if any(not p.grad.isfinite().all() for p in parameters):
            optimizer.step()
        optimizer.zero_grad()

    assert "With a gradient of inf the weights have changed" in _said(capsys, "fp16_update", steps_anyway)


def test_an_error_in_the_answer_is_reported_and_not_raised(capsys):
    function = _fp16("backward", "unscale", "unscale", "step", "update")
    assert "your function raised RuntimeError: unscale_() has already been called" in _said(
        capsys, "fp16_update", function
    )
