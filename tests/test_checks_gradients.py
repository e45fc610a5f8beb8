"""The checks of notebook 02: the solution passes, the stub does not, and each mistake gets its hint."""

from helpers.checks import gradients as checks

import torch
from exercises import exercise_functions, exercise_tests

STUBS, SOLUTIONS = exercise_functions("02_gradient_flow")


def _no_scaling(G, A, B, scaling):
    return B.T @ G, G @ A.T


def _swapped(G, A, B, scaling):
    return scaling * G @ A.T, scaling * B.T @ G


def _transposed(G, A, B, scaling):
    return scaling * G.T @ B, scaling * G @ A.T


def _twice(G, A, B, scaling):
    return scaling**2 * B.T @ G, scaling * G @ A.T


def _negative(G, A, B, scaling):
    return -scaling * B.T @ G, scaling * G @ A.T


def _one(G, A, B, scaling):
    return scaling * B.T @ G


def _raises(G, A, B, scaling):
    return scaling * B @ G, scaling * G @ A.T


def _frozen_too(model):
    return sum(2 * p.numel() * p.element_size() for p in model.parameters())


def _one_mean(model):
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def _entries(model):
    return sum(2 * p.numel() for p in model.parameters() if p.requires_grad)


def _always_four(model):
    return sum(8 * p.numel() for p in model.parameters() if p.requires_grad)


def _by_grad(model):
    return sum(2 * p.numel() * p.element_size() for p in model.parameters() if p.grad is not None)


def _by_sum(before, model):
    return {name: abs(before[name].sum() - p.sum()).item() > 1e-8 for name, p in model.named_parameters()}


def _close(before, model):
    return {name: not torch.allclose(before[name], p) for name, p in model.named_parameters()}


def _trainable_only(before, model):
    return {n: not torch.equal(before[n], p) for n, p in model.named_parameters() if p.requires_grad}


def _upside_down(before, model):
    return {name: torch.equal(before[name], p) for name, p in model.named_parameters()}


def _frozen_is_still(before, model):
    return {n: p.requires_grad and not torch.equal(before[n], p) for n, p in model.named_parameters()}


WRONG = [
    ("lora_gradients", _no_scaling, "lacks the scaling"),
    ("lora_gradients", _swapped, "The two are swapped"),
    ("lora_gradients", _transposed, "The gradient of A is transposed"),
    ("lora_gradients", _twice, "has the scaling twice"),
    ("lora_gradients", _negative, "wrong sign"),
    ("lora_gradients", _one, "Return two tensors"),
    ("lora_gradients", _raises, "your function raised RuntimeError"),
    ("adamw_state_bytes", _frozen_too, "counted the frozen parameters"),
    ("adamw_state_bytes", _one_mean, "two means"),
    ("adamw_state_bytes", _entries, "number of entries"),
    ("adamw_state_bytes", _always_four, "bfloat16 too"),
    ("adamw_state_bytes", _by_grad, "go by `requires_grad`"),
    ("moved", _by_sum, "compare the entries, not their sum"),
    ("moved", _close, "compare exactly"),
    ("moved", _trainable_only, "the frozen ones too"),
    ("moved", _upside_down, "upside down"),
    ("moved", _frozen_is_still, "A frozen parameter moved"),
]


test_the_solution_passes_and_the_stub_does_not, test_a_mistake_gets_its_hint = exercise_tests(
    checks, STUBS, SOLUTIONS, WRONG
)


def test_every_exercise_has_three_wrong_answers_or_more():
    for name in STUBS:
        assert sum(exercise == name for exercise, _, _ in WRONG) >= 3
