"""The loss of causal-language-model training, and gradient accumulation that equals one large batch.

The usual `(loss / steps).backward()` averages the means of the micro-batches, so a token counts for
more where labels are few. Here token losses are summed and divided by the label tokens of the
window, as the Trainer does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TypeVar

from helpers.data import IGNORE_INDEX

import torch
from torch import nn

Batch = TypeVar("Batch")


def label_tokens(labels: torch.Tensor) -> int:
    """Return the number of label tokens in `labels` (batch, T): those on which the loss is taken.

    The token at t is predicted at t - 1, so the first label of a row never counts.
    """
    return int((labels[:, 1:] != IGNORE_INDEX).sum())


def token_loss_sum(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the sum of the losses of a batch's label tokens, in nats: - sum of log p(token at t | tokens before t).

    It is computed from the logits, since transformers' own loss rounds fp64 logits to fp32 and a
    model may ignore `num_items_in_batch`. A loss that the model adds, such as a router's, is left
    out.

    Args:
        model: a causal language model, plain or with an adapter; its train or eval mode is used as
            it is.
        batch: tensors for the model, on its device, and `labels` (batch, T), not shifted, -100
            where there is none.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    targets = batch["labels"][:, 1:]  # (batch, T - 1)
    logits = model(**inputs).logits[:, :-1]  # (batch, T - 1, vocabulary): what follows the last token is unknown
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # 16 bits are too coarse for a sum
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten().to(logits.device), ignore_index=IGNORE_INDEX, reduction="sum"
    )


def windows(dataloader: Iterable[Batch], steps: int) -> Iterator[list[Batch]]:
    """Yield the micro-batches of one pass over `dataloader` in lists of `steps`, the last one shorter if need be.

    No more than one window is in memory at a time. A ValueError says that `steps` is below 1.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: a window needs at least one micro-batch; pass steps=1 for no accumulation")
    micro_batches = iter(dataloader)
    while window := list(islice(micro_batches, steps)):
        yield window


def accumulated_step(
    model: nn.Module,
    micro_batches: Iterable[Mapping[str, torch.Tensor]],
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float | None = None,
) -> float:
    """Take one optimizer step on a window of micro-batches, as if they were one large batch.

    Loss and gradient equal those of one batch that holds all rows, to rounding, however the rows
    are split and padded. They differ (1) with dropout, whose masks are random; with padding on the
    left, (2) where a row's first token is a label, and (3) by fp32 rounding even in an fp64 model,
    since the rotary angles of the shifted positions are computed in fp32.

    Args:
        model: as for `token_loss_sum`.
        micro_batches: as its `batch`; they are moved to the model's device.
        optimizer: over the model's trainable parameters. Its gradients are cleared after the step.
        max_grad_norm: if given, the norm to which the gradient of the whole window is clipped.

    Returns:
        The window's loss in nats per label token, before the step.

    Raises:
        ValueError: the window has no label token, or a parameter already holds a gradient. Nothing
            has been changed.
    """
    micro_batches = list(micro_batches)
    if any("labels" not in batch for batch in micro_batches):
        raise ValueError("a micro-batch has no 'labels'; keep them in the batch, with -100 where there is no label")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm={max_grad_norm}: pass a positive number, or None for no clipping")
    leftover = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    if leftover:  # clearing them here would hide the loop's fault and lose the work that they stand for
        raise ValueError(
            f"{len(leftover)} parameters hold gradients from an earlier backward pass ({leftover[0]}, …), which would "
            "leak into this step; call model.zero_grad() first, and give the optimizer all trainable parameters"
        )
    total = sum(label_tokens(batch["labels"]) for batch in micro_batches)
    if total == 0:
        raise ValueError(
            "the window has no label token, so there is nothing to learn from; "
            "check that truncation leaves part of each completion, or skip the window"
        )
    device = next(model.parameters()).device
    window_loss = torch.zeros((), device=device)
    for batch in micro_batches:
        # L = (sum of all token losses) / total. Each micro-batch adds the gradient of its share of
        # L, so that only one micro-batch's activations are in memory.
        share = token_loss_sum(model, {key: value.to(device) for key, value in batch.items()}) / total
        share.backward()
        window_loss = window_loss + share.detach().to(device)
    if max_grad_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return window_loss.item()
