"""The checks of notebook 02: the gradients of A and B, AdamW's state, and what has moved."""

from __future__ import annotations

from collections.abc import Callable

from helpers.checks.base import Hint, check

import torch
from torch import nn


def lora_gradients(
    function: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """Check `lora_gradients(G, A, B, scaling)` against autograd, in float64, with a scaling that is not 1."""

    def test() -> None:
        torch.manual_seed(0)
        scaling = 4.0
        G = torch.randn(5, 6, dtype=torch.float64)
        A = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
        B = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
        (G * (scaling * B @ A)).sum().backward()  # a loss whose gradient with respect to W is G
        answer = function(G, A.detach(), B.detach(), scaling)
        if not isinstance(answer, tuple | list) or len(answer) != 2:
            raise Hint("Return two tensors: the gradient of A, and the gradient of B.")
        dA, dB = answer
        expected_A, expected_B = A.grad, B.grad
        if dA.shape == B.shape and dB.shape == A.shape:
            raise Hint("The two are swapped: return A's gradient (r, in) first, then B's (out, r).")
        for name, gradient, expected in (("A", dA, expected_A), ("B", dB, expected_B)):
            if gradient.shape == expected.T.shape and gradient.shape != expected.shape:
                raise Hint(f"The gradient of {name} is transposed: a gradient has the shape of its parameter.")
            if gradient.shape != expected.shape:
                raise Hint(f"The gradient of {name} has shape {tuple(gradient.shape)}, not {tuple(expected.shape)}.")
            if torch.allclose(gradient * scaling, expected):
                raise Hint(f"The gradient of {name} lacks the scaling, which is a factor of both.")
            if torch.allclose(gradient, expected * scaling):
                raise Hint(f"The gradient of {name} has the scaling twice; it enters once.")
            if torch.allclose(gradient, -expected):
                raise Hint(f"The gradient of {name} has the wrong sign: the optimizer subtracts it, not the gradient.")
            if not torch.allclose(gradient, expected):
                raise Hint(f"The gradient of {name} is not autograd's. It is a product of G and the other matrix.")

    check(function, test, "With B = 0 the gradient of A is zero: that is why A waits for one step.")


def adamw_state_bytes(function: Callable[[nn.Module], int]) -> None:
    """Check `adamw_state_bytes(model)` against the state that AdamW really keeps after a step."""

    def test() -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(4, 6), nn.Linear(6, 2).to(torch.bfloat16))
        model[0].requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        means = [t for state in optimizer.state.values() for key, t in state.items() if key != "step"]
        expected = sum(t.numel() * t.element_size() for t in means)
        everything = sum(2 * p.numel() * p.element_size() for p in model.parameters())
        elements = sum(t.numel() for t in means)
        for parameter in model.parameters():
            parameter.grad = None
        answer = function(model)
        if answer == everything:
            raise Hint("You counted the frozen parameters too. AdamW keeps nothing for a parameter without a gradient.")
        if 2 * answer == expected:
            raise Hint("AdamW keeps two means for each parameter: of the gradient, and of its square.")
        if answer == elements:
            raise Hint("That is the number of entries. Multiply by the bytes of one: `p.element_size()`.")
        if answer == 4 * elements:
            raise Hint("Not every parameter has 4 bytes an entry: this model has bfloat16 too. Use `p.element_size()`.")
        if answer == 0:
            raise Hint("You got 0. Before the first step `.grad` is None everywhere: go by `requires_grad`.")
        if answer != expected:
            raise Hint(f"AdamW kept {expected} bytes for the test's model, and you say {answer}.")

    check(function, test, "Two means for each trained entry, and nothing for a frozen one: that is LoRA's saving.")


def moved(function: Callable[[dict[str, torch.Tensor], nn.Module], dict[str, bool]]) -> None:
    """Check `moved(before, model)` on changes that are tiny, cancel in the sum, or happen to a frozen parameter."""

    def test() -> None:
        torch.manual_seed(0)
        model = nn.ModuleDict({name: nn.Linear(4, 3, bias=False) for name in ("still", "tiny", "balanced", "frozen")})
        model["frozen"].requires_grad_(False)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        with torch.no_grad():
            model["tiny"].weight[0, 0] += 1e-6
            model["balanced"].weight[0, 0] += 1.0
            model["balanced"].weight[0, 1] -= 1.0
            model["frozen"].weight *= 0.9
        saved = {name: tensor.clone() for name, tensor in before.items()}
        answer = function(before, model)
        names = [name for name, _ in model.named_parameters()]
        if not isinstance(answer, dict):
            raise Hint("Return a dictionary from the parameter's name to True or False.")
        if set(answer) != set(names):
            missing = sorted(set(names) - set(answer)) or sorted(set(answer) - set(names))
            raise Hint(f"Answer for every parameter, the frozen ones too: look at {', '.join(missing)}.")
        if any(not torch.equal(before[name], saved[name]) for name in names):
            raise Hint("Your function changes `before`; only compare.")
        flags = {name.removesuffix(".weight"): bool(value) for name, value in answer.items()}
        if flags == {"still": True, "tiny": False, "balanced": False, "frozen": False}:
            raise Hint("The answer is upside down: True means that the parameter has moved.")
        if flags["still"]:
            raise Hint("You say that a parameter moved that did not.")
        if not flags["frozen"]:
            raise Hint("A frozen parameter moved, and you missed it. That is the case we fear most: compare all.")
        if not flags["balanced"]:
            raise Hint("Two entries changed by +1 and -1, and you missed it: compare the entries, not their sum.")
        if not flags["tiny"]:
            raise Hint("One entry changed by 1e-6, and you missed it: compare exactly, not with a tolerance.")

    check(function, test, "It sees any change, also of a weight that should be frozen.")
