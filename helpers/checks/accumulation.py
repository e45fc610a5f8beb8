"""The checks of notebook 03_gradient_accumulation.

Each compares the answer with the right one and with what the likely mistakes give, on windows so uneven that no two of
them agree by chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

from helpers.checks.base import Hint, check, compare
from helpers.data import IGNORE_INDEX

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = dict[str, Tensor]
VOCABULARY = 11
MEAN_OF_MEANS = (
    "This is the mean of the micro-batches' means: a token counts for more in a micro-batch with few labels. Divide "
    "the sum of all token losses by the label tokens of the whole window."
)


def number_of_updates(answer: Callable[[int, int, int, int], int]) -> None:
    """Check `number_of_updates(examples, micro_batch, steps, epochs)`: round up twice in each epoch."""

    def test() -> None:
        cases = ((20, 2, 4, 1), (20, 2, 4, 3), (21, 4, 3, 2), (7, 8, 4, 1), (400, 8, 4, 3), (17, 4, 4, 2))
        results = [answer(*case) for case in cases]
        if None in results:
            raise Hint("It returns None; return the number of updates.")
        right, mistakes = [], []
        for examples, micro_batch, steps, epochs in cases:
            micro_batches = math.ceil(examples / micro_batch)
            right.append(epochs * math.ceil(micro_batches / steps))
            wrong = {
                "It counts micro-batches; the optimizer steps once for each window of `steps` of them.": micro_batches,
                "It rounds down, so the tail is lost: a shorter last window counts too.": micro_batches // steps,
                "It rounds down, so the last rows are lost: a shorter last micro-batch, and a shorter last window, "
                "count too.": examples // (micro_batch * steps),
                "It drops a last micro-batch of fewer than `micro_batch` rows.": -(examples // micro_batch // -steps),
            }
            wrong = {hint: epochs * count for hint, count in wrong.items()}
            across = math.ceil(epochs * micro_batches / steps)
            wrong["It lets a window run on into the next epoch: round up first, then multiply by `epochs`."] = across
            wrong["It counts one epoch: multiply by `epochs`."] = math.ceil(micro_batches / steps)
            mistakes.append(wrong)
        for hint in mistakes[0]:
            if results != right and results == [wrong[hint] for wrong in mistakes]:
                raise Hint(hint)
        for case, result, expected in zip(cases, results, right, strict=True):
            if result != expected:
                words = "examples={}, micro_batch={}, steps={}, epochs={}".format(*case)
                raise Hint(f"For {words} there are {expected} updates, and it says {result}.")

    check(answer, test, "Every micro-batch and every window counts, the short ones at the end of an epoch too.")


def window_loss(answer: Callable[[list[Tensor], list[Tensor]], Tensor]) -> None:
    """Check `window_loss(logits, labels)`: the sum of all token losses over the label tokens of the window."""

    def test() -> None:
        # The second row has no prompt: its first token carries a label, and nothing predicts it.
        batches = [_batch([(9, 7), (4, 4)], 0), _batch([(5, 1), (3, 1), (6, 2)], 1), _batch([(8, 3)], 2)]
        labels = [batch["labels"] for batch in batches]
        generator = torch.Generator().manual_seed(3)
        logits = [torch.randn(*y.shape, VOCABULARY, generator=generator, dtype=torch.float64) for y in labels]
        result = answer([x.clone().requires_grad_() for x in logits], [y.clone() for y in labels])
        if not isinstance(result, Tensor) or result.ndim != 0:
            kind = f"a tensor of shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise Hint(f"It returns {kind}; return a tensor with one number, on which backward() can be called.")

        sums = [_token_loss_sum(x, y) for x, y in zip(logits, labels, strict=True)]
        counts, rows = [_label_tokens(y) for y in labels], [len(y) for y in labels]
        means = [s / n for s, n in zip(sums, counts, strict=True)]
        unshifted, backwards = (
            sum(
                F.cross_entropy(x[:, here].flatten(0, 1), y[:, there].flatten(), reduction="sum")
                for x, y in zip(logits, labels, strict=True)
            )
            for here, there in ((slice(None), slice(None)), (slice(1, None), slice(None, -1)))
        )
        mistakes = [(sum(sums) / divisor, hint) for divisor, hint in _divisors(batches)]
        mistakes += [
            (sum(means) / len(means), MEAN_OF_MEANS),
            (sum(means), "It adds up the micro-batches' means: divide one sum of token losses by one count of labels."),
            (
                sum(m * r for m, r in zip(means, rows, strict=True)) / sum(rows),
                "It weights the micro-batches' means by rows; their weight is the number of label tokens.",
            ),
        ]
        for count in (sum(counts), sum(_label_tokens(y, shifted=False) for y in labels)):
            mistakes += [
                (unshifted / count, "Logits and labels are not shifted: logits[:, t] predict the label at t + 1."),
                (backwards / count, "They are shifted the wrong way: logits[:, :-1] belong to labels[:, 1:]."),
            ]
        right = sum(sums) / sum(counts)
        otherwise = f"On our window it should be {right:.4f}, and it is {result:.4f}."
        compare(result.detach(), right, mistakes, otherwise)
        if not result.requires_grad:
            raise Hint("The number is right, but it is cut off from the logits: leave out .item() and .detach().")

    check(answer, test, "One sum of token losses over one count of label tokens, however the window is split.")


def train_epoch(answer: Callable[[nn.Module, list[Batch], torch.optim.Optimizer, int], int]) -> None:
    """Check `train_epoch(model, micro_batches, optimizer, steps)` by the gradients that the optimizer gets."""

    def test() -> None:
        torch.manual_seed(0)
        model = _ToyLM()
        parameters = list(model.parameters())
        shapes = [[(9, 7), (4, 4)], [(5, 1), (3, 1)], [(8, 2), (7, 1)], [(9, 8), (9, 6)], [(6, 3), (5, 4)]]
        batches = [_batch(rows, seed) for seed, rows in enumerate(shapes)]
        losses = [_token_loss_sum(model(batch["input_ids"]).logits, batch["labels"]) for batch in batches]
        sums = [_flat(torch.autograd.grad(loss, parameters)) for loss in losses]
        counts = [_label_tokens(batch["labels"]) for batch in batches]
        right = [sum(sums[i : i + 2]) / sum(counts[i : i + 2]) for i in (0, 2, 4)]
        means = [s / n for s, n in zip(sums, counts, strict=True)]

        optimizer = torch.optim.SGD(parameters, lr=0.0)  # so every gradient is taken at the same weights
        seen: list[Tensor] = []
        optimizer.register_step_pre_hook(
            lambda *_: seen.append(_flat([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]))
        )
        returned = [answer(model, [dict(batch) for batch in batches], optimizer, 2) for _ in range(2)]
        if not seen:
            raise Hint("It never calls optimizer.step().")
        if len(seen) == 10:
            raise Hint("It steps after every micro-batch: step once for each window of `steps` of them.")
        first = [
            (
                torch.zeros_like(seen[0]),
                "The optimizer gets no gradient: call zero_grad() after step(), not before it.",
            ),
            (sum(means[:2]) / 2, MEAN_OF_MEANS),
            (sum(means[:2]), "It adds up the micro-batches' means: divide the token losses by the window's labels."),
            (right[0] / 2, "It divides by `steps` as well: dividing by the label tokens of the window is enough."),
        ]
        first += [(sum(sums[:2]) / divisor, hint) for divisor, hint in _divisors(batches[:2])]
        if torch.cosine_similarity(seen[0], sums[1], dim=0) > 1 - 1e-9:
            raise Hint(
                "Only the last micro-batch of the window is left in .grad: call zero_grad() once for each window."
            )
        compare(seen[0], right[0], first, "Update 1 does not get the gradient of its window, taken as one batch.")
        if len(seen) == 4 and torch.allclose(seen[1], right[1]):
            if torch.allclose(seen[2], right[0] + right[2]):
                fate = "is not stepped, and its gradients leak into the first update of the next epoch"
            else:
                fate = "is dropped"
            raise Hint(f"5 micro-batches with steps=2 are 3 updates, and it makes 2: the tail {fate}.")
        if len(seen) != 6:
            raise Hint(f"Two epochs of 5 micro-batches with steps=2 are 6 updates, and it makes {len(seen)}.")
        later = [
            (
                right[0] + right[1],
                "The second update still holds the gradients of the first: call zero_grad() after step().",
            ),
            (right[2] / 2, "The tail has half its weight: it has one micro-batch and is divided as if it had `steps`."),
        ]
        for number, gradient in enumerate(seen):
            otherwise = f"Update {number + 1} of 6 does not get the gradient of its window, taken as one batch."
            compare(gradient, right[number % 3], later, otherwise)
        if returned != [3, 3]:
            raise Hint(f"The updates are right. Return their number, which is 3; it returns {returned[0]!r}.")

    check(answer, test, "Weighted by tokens, the tail stepped, nothing left over.")


def accelerate_loss(answer: Callable[[Tensor, int, int, int], Tensor]) -> None:
    """Check `accelerate_loss(token_loss_sum, label_tokens, steps, processes)`: undo both of the later divisions."""

    def test() -> None:
        cases = [(torch.tensor(12.0), 40, 4, 1), (torch.tensor(30.0), 120, 4, 2), (torch.tensor(7.0), 20, 8, 3)]
        results = [answer(*case) for case in cases]
        if any(result is None for result in results):
            raise Hint("It returns None; return the loss for accelerator.backward.")
        result = torch.stack([torch.as_tensor(value, dtype=torch.float32).detach() for value in results])
        total, tokens, steps, processes = (torch.tensor([float(case[i]) for case in cases]) for i in range(4))
        mean, right = total / tokens, total / tokens * steps * processes
        mistakes = [
            (mean, "Both divisions are still to be undone, the one by `steps` and the one by `processes`."),
            (mean * processes, "accelerator.backward divides by `steps`: multiply by `steps` to undo it."),
            (mean * steps, "DDP averages the gradients over the processes: multiply by `processes` to undo it."),
            (mean / steps, "accelerator.backward divides by `steps` already: multiply by it, do not divide again."),
            (mean * steps / processes, "DDP divides by `processes` already: multiply by it, do not divide again."),
            (right * tokens, "Divide by the label tokens of the window."),
        ]
        otherwise = f"For a sum of 12, 40 tokens, 4 steps and 1 process it is {right[0]:.2f}, not {result[0]:.2f}."
        compare(result, right, mistakes, otherwise)

    check(answer, test, "After both divisions each label token of the window has the same weight.")


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
        divisor = options.get("num_items_in_batch", _label_tokens(labels))
        return SimpleNamespace(logits=logits, loss=_token_loss_sum(logits, labels) / divisor)


def _batch(rows: list[tuple[int, int]], seed: int) -> Batch:
    """Return rows given as (tokens, of which the last so many are labels), padded on the right to one more."""
    longest = max(tokens for tokens, _ in rows) + 1
    ids = torch.randint(1, VOCABULARY, (len(rows), longest), generator=torch.Generator().manual_seed(seed))
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE_INDEX)
    for i, (tokens, learned) in enumerate(rows):
        mask[i, :tokens] = 1
        labels[i, tokens - learned : tokens] = ids[i, tokens - learned : tokens]
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def _token_loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def _label_tokens(labels: Tensor, shifted: bool = True) -> int:
    return int((labels[:, 1:] if shifted else labels).ne(IGNORE_INDEX).sum())


def _divisors(batches: list[Batch]) -> list[tuple[int, str]]:
    """What the sum of a window's token losses is wrongly divided by, each with its hint."""
    labels, masks = ([batch[key] for batch in batches] for key in ("labels", "attention_mask"))
    shift = "It counts the labels before the shift: nothing predicts a row's first token, so count in labels[:, 1:]."
    everywhere = "It counts every position, prompt and padding too: count only where labels[:, 1:] != -100."
    return [
        (1, "The token losses are summed and not divided: divide by the label tokens of the window."),
        (sum(_label_tokens(y, shifted=False) for y in labels), shift),
        (sum(len(y) for y in labels), "It divides by the number of rows: divide by that of the label tokens."),
        (sum(y.numel() for y in labels), everywhere),
        (sum(y[:, 1:].numel() for y in labels), everywhere),
        (sum(int(m.sum()) for m in masks), "It counts the prompt too: count only where labels[:, 1:] != -100."),
    ]


def _flat(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])
