"""The exercises of notebook 02: the right answers and the likely wrong ones, each with its hint."""

from __future__ import annotations

from collections.abc import Callable

from helpers.checks.base import Answer, Exercise

import torch
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """Return what `make` returns, the same each time, and leave torch's random numbers as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def _by_autograd(G: Tensor, A: Tensor, B: Tensor, scaling: float) -> Pair:
    A, B = (matrix.detach().requires_grad_() for matrix in (A, B))
    return torch.autograd.grad((G * (scaling * B @ A)).sum(), (A, B))  # a loss whose gradient with respect to W is G


def _changed(part: int, change: Callable[[Tensor, float], Tensor]) -> Answer:
    """Return an answer whose gradient of A (0) or of B (1) is changed."""

    def answer(G: Tensor, A: Tensor, B: Tensor, scaling: float) -> Pair:
        pair = list(_by_autograd(G, A, B, scaling))
        pair[part] = change(pair[part], scaling)
        return pair[0], pair[1]

    return answer


lora_gradients = Exercise(
    right=_by_autograd,
    cases=[(_random(5, 6), _random(2, 6), _random(5, 2), 4.0)],
    mistakes={
        "The two are swapped: return A's gradient (r, in) first, then B's (out, r).":
            lambda G, A, B, scaling: (scaling * G @ A.T, scaling * B.T @ G),
    }
    | {
        f"The gradient of {name} {hint}": _changed(part, change)
        for part, name in enumerate("AB")
        for hint, change in {
            "is transposed: a gradient has the shape of its parameter.": lambda gradient, scaling: gradient.T,
            "lacks the scaling, which is a factor of both.": lambda gradient, scaling: gradient / scaling,
            "has the scaling twice; it enters once.": lambda gradient, scaling: gradient * scaling,
            "has the wrong sign: the optimizer subtracts it, not the gradient.": lambda gradient, scaling: -gradient,
        }.items()
    },
    returns="two tensors: the gradient of A, and the gradient of B",
    otherwise=lambda G, A, B, scaling, found, right: (
        f"The gradient of {'B' if torch.allclose(found[0], right[0]) else 'A'} is not autograd's. It is a product of G "
        "and the other matrix."
    ),
    learned="With B = 0 the gradient of A is zero: that is why A waits for one step.",
)  # fmt: skip


def _kept_by_adamw(model: nn.Module) -> int:
    """Take a step on a copy of the model and count what the optimizer keeps after it."""
    parameters = [
        parameter.detach().clone().requires_grad_(parameter.requires_grad) for parameter in model.parameters()
    ]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    means = [tensor for state in optimizer.state.values() for key, tensor in state.items() if key != "step"]
    return sum(mean.numel() * mean.element_size() for mean in means)


def _layers() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(4, 6), nn.Linear(6, 2).to(torch.bfloat16))
    model[0].requires_grad_(False)
    return model


def _count(of: Callable[[Tensor], int], counted: Callable[[Tensor], bool] = lambda p: p.requires_grad) -> Answer:
    return lambda model: sum(of(p) for p in model.parameters() if counted(p))


adamw_state_bytes = Exercise(
    right=_kept_by_adamw,
    cases=[(_seeded(_layers),)],
    mistakes={
        "You counted the frozen parameters too. AdamW keeps nothing for a parameter without a gradient.":
            _count(lambda p: 2 * p.numel() * p.element_size(), lambda p: True),
        "AdamW keeps two means for each parameter: of the gradient, and of its square.":
            _count(lambda p: p.numel() * p.element_size()),
        "That is the number of entries. Multiply by the bytes of one: `p.element_size()`.":
            _count(lambda p: 2 * p.numel()),
        "Not every parameter has 4 bytes an entry: this model has bfloat16 too. Use `p.element_size()`.":
            _count(lambda p: 8 * p.numel()),
        "You got 0. Before the first step `.grad` is None everywhere: go by `requires_grad`.":
            _count(lambda p: 2 * p.numel() * p.element_size(), lambda p: p.grad is not None),
    },
    returns="an int",
    otherwise=lambda model, found, right: f"AdamW kept {right} bytes for the test's model, and you say {found}.",
    learned="Two means for each trained entry, and nothing for a frozen one: that is LoRA's saving.",
)  # fmt: skip


def _trained() -> nn.Module:
    model = nn.ModuleDict({name: nn.Linear(4, 3, bias=False) for name in ("still", "tiny", "balanced", "frozen")})
    model["frozen"].requires_grad_(False)
    return model


def _before_and_after() -> tuple[dict[str, Tensor], nn.Module]:
    model = _seeded(_trained)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        model["tiny"].weight[0, 0] += 1e-6
        model["balanced"].weight[0, 0] += 1.0
        model["balanced"].weight[0, 1] -= 1.0
        model["frozen"].weight *= 0.9
    return before, model


def _moved(differs: Callable[[Tensor, Tensor], object]) -> Answer:
    return lambda before, model: {name: bool(differs(before[name], p)) for name, p in model.named_parameters()}


MISSED = {
    "frozen": "A frozen parameter moved, and you missed it. That is the case we fear most: compare all.",
    "balanced": "Two entries changed by +1 and -1, and you missed it: compare the entries, not their sum.",
    "tiny": "One entry changed by 1e-6, and you missed it: compare exactly, not with a tolerance.",
}


def _missed(before: dict[str, Tensor], model: nn.Module, found: dict[str, bool], right: dict[str, bool]) -> str:
    if other := sorted(right.keys() - found.keys()) or sorted(found.keys() - right.keys()):
        return f"Answer for every parameter, the frozen ones too: look at {', '.join(other)}."
    if found["still.weight"]:
        return "You say that a parameter moved that did not."
    return next(hint for name, hint in MISSED.items() if not found[f"{name}.weight"])


moved = Exercise(
    right=_moved(lambda before, after: not torch.equal(before, after)),
    cases=[_before_and_after()],
    mistakes={
        "The answer is upside down: True means that the parameter has moved.": _moved(torch.equal),
        MISSED["frozen"]: _moved(lambda before, after: after.requires_grad and not torch.equal(before, after)),
        MISSED["balanced"]: _moved(lambda before, after: abs(before.sum() - after.sum()) > 1e-8),
        MISSED["tiny"]: _moved(lambda before, after: not torch.allclose(before, after)),
    },
    returns="a dictionary from the parameter's name to True or False",
    otherwise=_missed,
    learned="It sees any change, also of a weight that should be frozen.",
)
