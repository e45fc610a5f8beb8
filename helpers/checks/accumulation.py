"""The exercises of notebook 03: the right answers and the likely wrong ones, each with its hint."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from helpers.checks.base import Answer, Exercise, Hint
from helpers.data import IGNORE_INDEX

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = dict[str, Tensor]
VOCABULARY = 11


def _up(a: float, b: float) -> int:
    return math.ceil(a / b)


number_of_updates = Exercise(
    right=lambda examples, micro_batch, steps, epochs: epochs * _up(_up(examples, micro_batch), steps),
    cases=[(20, 2, 4, 1), (20, 2, 4, 3), (21, 4, 3, 2), (7, 8, 4, 1), (400, 8, 4, 3), (17, 4, 4, 2)],
    mistakes={
        "It counts micro-batches; the optimizer steps once for each window of `steps` of them.":
            lambda n, m, steps, epochs: epochs * _up(n, m),
        "It rounds down, so the tail is lost: a shorter last window counts too.":
            lambda n, m, steps, epochs: epochs * (_up(n, m) // steps),
        "It rounds down, so the last rows are lost: a shorter last micro-batch, and a shorter last window, count "
        "too.": (lambda n, m, steps, epochs: epochs * (n // (m * steps))),
        "It drops a last micro-batch of fewer than `micro_batch` rows.":
            lambda n, m, steps, epochs: epochs * _up(n // m, steps),
        "It lets a window run on into the next epoch: round up first, then multiply by `epochs`.":
            lambda n, m, steps, epochs: _up(epochs * _up(n, m), steps),
        "It counts one epoch: multiply by `epochs`.": lambda n, m, steps, epochs: _up(_up(n, m), steps),
    },
    returns="the number of updates, an int",
    otherwise=lambda n, m, steps, epochs, found, right: (
        f"For examples={n}, micro_batch={m}, steps={steps}, epochs={epochs} there are {right} updates, and it says "
        f"{found}."
    ),
    learned="Every micro-batch and every window counts, the short ones at the end of an epoch too.",
)  # fmt: skip

MEAN_OF_MEANS = (
    "This is the mean of the micro-batches' means: a token counts for more in a micro-batch with few labels. Divide "
    "the sum of all token losses by the label tokens of the whole window."
)
CUT_OFF = "The number is right, but it is cut off from the logits: leave out .item() and .detach()."


def _label_tokens(labels: list[Tensor]) -> int:
    return sum(int(y[:, 1:].ne(IGNORE_INDEX).sum()) for y in labels)  # nothing predicts a row's first token


def _before_the_shift(labels: list[Tensor]) -> int:
    return sum(int(y.ne(IGNORE_INDEX).sum()) for y in labels)


# What the sum of a window's token losses is wrongly divided by, a function of the window's labels.
WRONG_DIVISORS: dict[str, list[Callable[[list[Tensor]], int]]] = {
    "The token losses are summed and not divided: divide by the label tokens of the window.": [lambda labels: 1],
    "It counts the labels before the shift: nothing predicts a row's first token, so count in labels[:, 1:].": [
        _before_the_shift
    ],
    "It divides by the number of rows: divide by that of the label tokens.": [lambda labels: sum(map(len, labels))],
    "It counts every position, prompt and padding too: count only where labels[:, 1:] != -100.": [
        lambda labels: sum(y.numel() for y in labels),
        lambda labels: sum(y[:, 1:].numel() for y in labels),
    ],
}
AS_IT_IS, FROM_1, TO_LAST = slice(None), slice(1, None), slice(None, -1)


def _token_loss_sum(logits: Tensor, labels: Tensor, here: slice = TO_LAST, there: slice = FROM_1) -> Tensor:
    return F.cross_entropy(logits[:, here].flatten(0, 1), labels[:, there].flatten(), reduction="sum")


def _over(divisor: Callable[[list[Tensor]], float], here: slice = TO_LAST, there: slice = FROM_1) -> Answer:
    """Return a window_loss that divides the sum of the token losses by `divisor(labels)`."""
    return lambda logits, labels: (
        sum(_token_loss_sum(x, y, here, there) for x, y in zip(logits, labels, strict=True)) / divisor(labels)
    )


def _means(weight: Callable[[Tensor, list[Tensor]], float]) -> Answer:
    """Return a window_loss that adds up the micro-batches' means, each with a weight."""
    return lambda logits, labels: sum(
        _over(_label_tokens)([x], [y]) * weight(y, labels) for x, y in zip(logits, labels, strict=True)
    )


def _batch(rows: list[tuple[int, int]], seed: int) -> Batch:
    """Return right-padded rows of (tokens, the last of which are learned)."""
    shape = len(rows), max(tokens for tokens, _ in rows)
    ids = torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE_INDEX)
    for i, (tokens, learned) in enumerate(rows):
        mask[i, :tokens] = 1
        labels[i, tokens - learned : tokens] = ids[i, tokens - learned : tokens]
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def _window() -> tuple[list[Tensor], list[Tensor]]:
    """Return logits and labels. The second row has no prompt: its first token has a label that nothing predicts."""
    labels = [_batch(rows, 0)["labels"] for rows in ([(9, 7), (4, 4)], [(5, 1), (3, 1), (6, 2)], [(8, 3)])]
    generator = torch.Generator().manual_seed(3)
    logits = [torch.randn(*y.shape, VOCABULARY, generator=generator, dtype=torch.float64) for y in labels]
    return [x.requires_grad_() for x in logits], labels


def _has_a_graph(answer: Answer) -> None:
    if not answer(*_window()).requires_grad:
        raise Hint(CUT_OFF)


window_loss = Exercise(
    right=_over(_label_tokens),
    cases=[_window()],
    mistakes={hint: [_over(divisor) for divisor in divisors] for hint, divisors in WRONG_DIVISORS.items()}
    | {
        MEAN_OF_MEANS: [_means(lambda y, labels: 1 / len(labels))],
        "It adds up the micro-batches' means: divide one sum of token losses by one count of labels.":
            [_means(lambda y, labels: 1)],
        "It weights the micro-batches' means by rows; their weight is the number of label tokens.":
            [_means(lambda y, labels: len(y) / sum(map(len, labels)))],
        "Logits and labels are not shifted: logits[:, t] predict the label at t + 1.":
            [_over(count, AS_IT_IS, AS_IT_IS) for count in (_label_tokens, _before_the_shift)],
        "They are shifted the wrong way: logits[:, :-1] belong to labels[:, 1:].":
            [_over(count, FROM_1, TO_LAST) for count in (_label_tokens, _before_the_shift)],
        CUT_OFF: [lambda logits, labels: _over(_label_tokens)(logits, labels).detach()],
    },
    returns="a tensor with one number, on which backward() can be called",
    otherwise=lambda logits, labels, found, right: f"On our window it should be {right:.4f}, and it is {found:.4f}.",
    further=[_has_a_graph],
    learned="One sum of token losses over one count of label tokens, however the window is split.",
)  # fmt: skip


class _ToyLM(nn.Module):
    """A causal language model without attention, which is called and answers like one of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 5, dtype=torch.float64)
        self.head = nn.Linear(5, VOCABULARY, bias=False, dtype=torch.float64)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **options: int
    ) -> SimpleNamespace:
        logits = self.head(torch.tanh(self.embedding(input_ids)))
        if labels is None:
            return SimpleNamespace(logits=logits)
        divisor = options.get("num_items_in_batch", _label_tokens([labels]))
        return SimpleNamespace(logits=logits, loss=_token_loss_sum(logits, labels) / divisor)


Trace = tuple[Tensor, list[Tensor], list[Any]]
Divisor = Callable[[list[Batch], Batch, int], float]


def _two_epochs(answer: Answer, steps: int) -> Trace:
    """Return the gradient of the first update, those of all, and what the answer returned."""
    torch.manual_seed(0)
    model = _ToyLM()
    parameters = list(model.parameters())
    shapes = [[(9, 7), (4, 4)], [(5, 1), (3, 1)], [(8, 2), (7, 1)], [(9, 8), (9, 6)], [(6, 3), (5, 4)]]
    optimizer = torch.optim.SGD(parameters, lr=0.0)  # so every gradient is taken at the same weights
    seen: list[Tensor] = []

    def note(*_: object) -> None:
        gradients = (torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)
        seen.append(torch.cat([gradient.detach().flatten() for gradient in gradients]))

    optimizer.register_step_pre_hook(note)
    batches = [_batch(rows, seed) for seed, rows in enumerate(shapes)]
    returned = [answer(model, [dict(batch) for batch in batches], optimizer, steps) for _ in range(2)]
    return seen[0] if seen else torch.zeros(0), seen, returned


def _labels(window: list[Batch]) -> list[Tensor]:
    return [batch["labels"] for batch in window]


def _of_labels(divisor: Callable[[list[Tensor]], float]) -> Divisor:
    return lambda window, batch, steps: divisor(_labels(window))


def _loop(
    divisor: Divisor = lambda window, batch, steps: _label_tokens(_labels(window)),
    tail: str = "step",
    zero: str = "after",
    windows_of: int | None = None,
) -> Answer:
    """Return a train_epoch: what a micro-batch's loss is divided by, and what becomes of tail and gradients."""

    def train_epoch(model: nn.Module, micro_batches: list[Batch], optimizer: torch.optim.Optimizer, steps: int) -> int:
        updates, length = 0, windows_of or steps
        for start in range(0, len(micro_batches), length):
            window = micro_batches[start : start + length]
            for batch in window:
                if zero == "each micro-batch":
                    optimizer.zero_grad()
                loss = _token_loss_sum(model(batch["input_ids"]).logits, batch["labels"])
                (loss / divisor(window, batch, steps)).backward()
            if zero == "before":
                optimizer.zero_grad()
            if tail == "step" or len(window) == length:
                optimizer.step()
                updates += 1
            if zero == "after" and (len(window) == length or tail != "leak"):
                optimizer.zero_grad()
        return updates

    return train_epoch


def _difference(steps: int, found: Trace, right: Trace) -> str:
    same = [torch.allclose(x, y) for x, y in zip(found[1], right[1], strict=False)]
    if same[0] and len(found[1]) != 6:
        return f"Two epochs of 5 micro-batches with steps=2 are 6 updates, and it makes {len(found[1])}."
    if not all(same):
        return f"Update {same.index(False) + 1} of 6 does not get the gradient of its window, taken as one batch."
    return f"The updates are right. Return their number, which is 3; it returns {found[2][0]!r}."


TAIL = "5 micro-batches with steps=2 are 3 updates, and it makes 2: the tail is"

train_epoch = Exercise(
    right=_loop(),
    cases=[(2,)],
    run=_two_epochs,
    mistakes={
        "It never calls optimizer.step().": [lambda model, micro_batches, optimizer, steps: 0],
        "It steps after every micro-batch: step once for each window of `steps` of them.": [_loop(windows_of=1)],
        "The optimizer gets no gradient: call zero_grad() after step(), not before it.": [_loop(zero="before")],
        MEAN_OF_MEANS: [
            _loop(lambda window, batch, steps: len(window) * _label_tokens(_labels([batch]))),
            _loop(lambda window, batch, steps: steps * _label_tokens(_labels([batch])), tail="leak"),
        ],
        "It adds up the micro-batches' means: divide the token losses by the window's labels.":
            [_loop(lambda window, batch, steps: _label_tokens(_labels([batch])))],
        "It divides by `steps` as well: dividing by the label tokens of the window is enough.":
            [_loop(lambda window, batch, steps: steps * _label_tokens(_labels(window)))],
        "It counts the prompt too: count only where labels[:, 1:] != -100.":
            [_loop(lambda window, batch, steps: sum(int(x["attention_mask"].sum()) for x in window))],
        "Only the last micro-batch of the window is left in .grad: call zero_grad() once for each window.":
            [_loop(zero="each micro-batch")],
        f"{TAIL} not stepped, and its gradients leak into the first update of the next epoch.": [_loop(tail="leak")],
        f"{TAIL} dropped.": [_loop(tail="drop")],
        "The second update still holds the gradients of the first: call zero_grad() after step().":
            [_loop(zero="never")],
        "The tail has half its weight: it has one micro-batch and is divided as if it had `steps`.":
            [_loop(lambda window, batch, steps: _label_tokens(_labels(window)) * steps / len(window))],
    }
    | {hint: [_loop(_of_labels(divisor)) for divisor in divisors] for hint, divisors in WRONG_DIVISORS.items()},
    otherwise=_difference,
    learned="Weighted by tokens, the tail stepped, nothing left over.",
)  # fmt: skip

accelerate_loss = Exercise(
    right=lambda token_loss_sum, label_tokens, steps, processes: token_loss_sum / label_tokens * steps * processes,
    cases=[(torch.tensor(12.0), 40, 4, 1), (torch.tensor(30.0), 120, 4, 2), (torch.tensor(7.0), 20, 8, 3)],
    mistakes={
        "Both divisions are still to be undone, the one by `steps` and the one by `processes`.":
            lambda total, n, steps, processes: total / n,
        "accelerator.backward divides by `steps`: multiply by `steps` to undo it.":
            lambda total, n, steps, processes: total / n * processes,
        "DDP averages the gradients over the processes: multiply by `processes` to undo it.":
            lambda total, n, steps, processes: total / n * steps,
        "accelerator.backward divides by `steps` already: multiply by it, do not divide again.":
            lambda total, n, steps, processes: total / n / steps,
        "DDP divides by `processes` already: multiply by it, do not divide again.":
            lambda total, n, steps, processes: total / n * steps / processes,
        "Divide by the label tokens of the window.": lambda total, n, steps, processes: total * steps * processes,
    },
    returns="the loss for accelerator.backward, a tensor with one number",
    otherwise=lambda *values: (
        "For a sum of {:g}, {} tokens, {} steps and {} process(es) it is {right:.2f}, not {found:.2f}.".format(
            *values[:4], found=values[4], right=values[5]
        )
    ),
    learned="After both divisions each label token of the window has the same weight.",
)  # fmt: skip
