"""The checks of notebook 03: the solution passes, the stub does not, and each mistake gets its hint."""

import math
from functools import partial

from helpers.checks import accumulation as checks

import torch
from exercises import exercise_functions, exercise_tests, said
from torch.nn import functional as F

STUBS, SOLUTIONS = exercise_functions("03_gradient_accumulation")
_said = partial(said, checks)


# number_of_updates(examples, micro_batch, steps, epochs)


def _micro_batches(n, m, steps, epochs):
    return epochs * math.ceil(n / m)


def _floor_of_windows(n, m, steps, epochs):
    return epochs * (math.ceil(n / m) // steps)


def _floor_of_rows(n, m, steps, epochs):
    return epochs * (n // (m * steps))


def _drop_last(n, m, steps, epochs):
    return epochs * math.ceil((n // m) / steps)


def _across_epochs(n, m, steps, epochs):
    return math.ceil(epochs * math.ceil(n / m) / steps)


def _one_epoch(n, m, steps, epochs):
    return math.ceil(math.ceil(n / m) / steps)


def _fraction(n, m, steps, epochs):
    return epochs * n / (m * steps)


def _nothing(*arguments):
    return None


# window_loss(logits, labels)


def _sum(x, y):
    return F.cross_entropy(x[:, :-1].flatten(0, 1), y[:, 1:].flatten(), reduction="sum")


def _window(logits, labels, count):
    return sum(_sum(x, y) for x, y in zip(logits, labels, strict=True)) / sum(count(y) for y in labels)


def _labels_after_the_shift(y):
    return (y[:, 1:] != -100).sum()


def _mean_of_means(logits, labels):
    return sum(_window([x], [y], _labels_after_the_shift) for x, y in zip(logits, labels, strict=True)) / len(logits)


def _sum_of_means(logits, labels):
    return _mean_of_means(logits, labels) * len(logits)


def _means_by_rows(logits, labels):
    means = [_window([x], [y], _labels_after_the_shift) * len(y) for x, y in zip(logits, labels, strict=True)]
    return sum(means) / sum(len(y) for y in labels)


def _before_the_shift(logits, labels):
    return _window(logits, labels, lambda y: (y != -100).sum())


def _padding_counted(logits, labels):
    return _window(logits, labels, lambda y: y[:, 1:].numel())


def _positions_counted(logits, labels):
    return _window(logits, labels, lambda y: y.numel())


def _by_rows(logits, labels):
    return _window(logits, labels, len)


def _not_divided(logits, labels):
    return _window(logits, labels, lambda y: 1 / len(labels))


def _not_shifted(logits, labels):
    total = sum(
        F.cross_entropy(x.flatten(0, 1), y.flatten(), reduction="sum") for x, y in zip(logits, labels, strict=True)
    )
    return total / sum((y != -100).sum() for y in labels)


def _shifted_backwards(logits, labels):
    total = sum(
        F.cross_entropy(x[:, 1:].flatten(0, 1), y[:, :-1].flatten(), reduction="sum")
        for x, y in zip(logits, labels, strict=True)
    )
    return total / sum(_labels_after_the_shift(y) for y in labels)


def _detached(logits, labels):
    return _window(logits, labels, _labels_after_the_shift).detach()


def _as_a_float(logits, labels):
    return _window(logits, labels, _labels_after_the_shift).item()


def _squared(logits, labels):
    return _window(logits, labels, _labels_after_the_shift) ** 2


# train_epoch(model, micro_batches, optimizer, steps)


def _loop(
    divisor,
    *,
    tail="step",
    zero="after",
    loss=lambda model, batch: _sum(model(batch["input_ids"]).logits, batch["labels"]),
):
    """A train_epoch: what the token losses of a window are divided by, and what happens to tail and gradients."""

    def train_epoch(model, micro_batches, optimizer, steps):
        updates = 0
        for start in range(0, len(micro_batches), steps):
            window = micro_batches[start : start + steps]
            for batch in window:
                if zero == "each micro-batch":
                    optimizer.zero_grad()
                (loss(model, batch) / divisor(window, batch, steps)).backward()
            if tail == "step" or len(window) == steps:
                if zero == "before":
                    optimizer.zero_grad()
                optimizer.step()
                updates += 1
            if zero == "after" and (len(window) == steps or tail != "leak"):
                optimizer.zero_grad()
        return updates

    return train_epoch


def _tokens(window):
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in window)


def _right_divisor(window, batch, steps):
    return _tokens(window)


def _textbook(model, micro_batches, optimizer, steps):
    updates = 0
    for i, batch in enumerate(micro_batches):
        (model(**batch).loss / steps).backward()
        if (i + 1) % steps == 0:
            optimizer.step()
            optimizer.zero_grad()
            updates += 1
    return updates


def _steps_each_time(model, micro_batches, optimizer, steps):
    return _loop(_right_divisor)(model, micro_batches, optimizer, 1)


def _never_steps(model, micro_batches, optimizer, steps):
    return len(micro_batches)


def _no_count(model, micro_batches, optimizer, steps):
    _loop(_right_divisor)(model, micro_batches, optimizer, steps)


def _two_windows_at_once(model, micro_batches, optimizer, steps):
    _loop(_right_divisor)(model, micro_batches[:steps], optimizer, steps)
    return 1 + _loop(_right_divisor)(model, micro_batches[steps:], optimizer, 3)


# accelerate_loss(token_loss_sum, label_tokens, steps, processes)


def _mean_of_micro_batch(total, n, steps, processes):
    return total / n


def _no_steps(total, n, steps, processes):
    return total / n * processes


def _no_processes(total, n, steps, processes):
    return total / n * steps


def _divided_again(total, n, steps, processes):
    return total / n / steps


def _processes_divided(total, n, steps, processes):
    return total / n * steps / processes


def _no_tokens(total, n, steps, processes):
    return total * steps * processes


def _off_by_one(total, n, steps, processes):
    return total / (n - 1) * steps * processes


WRONG = [
    ("number_of_updates", _micro_batches, "It counts micro-batches"),
    ("number_of_updates", _floor_of_windows, "so the tail is lost"),
    ("number_of_updates", _floor_of_rows, "so the last rows are lost"),
    ("number_of_updates", _drop_last, "drops a last micro-batch"),
    ("number_of_updates", _across_epochs, "run on into the next epoch"),
    ("number_of_updates", _one_epoch, "multiply by `epochs`"),
    ("number_of_updates", _fraction, "there are 3 updates, and it says 2.5"),
    ("number_of_updates", _nothing, "returns None"),
    ("window_loss", _mean_of_means, "the mean of the micro-batches' means"),
    ("window_loss", _sum_of_means, "adds up the micro-batches' means"),
    ("window_loss", _means_by_rows, "weights the micro-batches' means by rows"),
    ("window_loss", _before_the_shift, "counts the labels before the shift"),
    ("window_loss", _padding_counted, "prompt and padding too"),
    ("window_loss", _positions_counted, "prompt and padding too"),
    ("window_loss", _by_rows, "divides by the number of rows"),
    ("window_loss", _not_divided, "summed and not divided"),
    ("window_loss", _not_shifted, "are not shifted"),
    ("window_loss", _shifted_backwards, "shifted the wrong way"),
    ("window_loss", _detached, "cut off from the logits"),
    ("window_loss", _as_a_float, "It returns float"),
    ("window_loss", _squared, "On our window it should be"),
    ("window_loss", _nothing, "returns NoneType"),
    ("train_epoch", _textbook, "the mean of the micro-batches' means"),
    ("train_epoch", _loop(lambda w, b, s: len(w) * _tokens([b])), "the mean of the micro-batches' means"),
    ("train_epoch", _loop(lambda w, b, s: _tokens([b])), "adds up the micro-batches' means"),
    ("train_epoch", _loop(lambda w, b, s: s * _tokens(w)), "divides by `steps` as well"),
    ("train_epoch", _loop(lambda w, b, s: sum(len(x["labels"]) for x in w)), "divides by the number of rows"),
    ("train_epoch", _loop(lambda w, b, s: sum(int((x["labels"] != -100).sum()) for x in w)), "before the shift"),
    ("train_epoch", _loop(lambda w, b, s: sum(int(x["attention_mask"].sum()) for x in w)), "counts the prompt too"),
    ("train_epoch", _loop(lambda w, b, s: sum(x["labels"].numel() for x in w)), "prompt and padding too"),
    ("train_epoch", _loop(lambda w, b, s: 1), "summed and not divided"),
    ("train_epoch", _loop(lambda w, b, s: _tokens(w) * s / len(w)), "The tail has half its weight"),
    ("train_epoch", _loop(_right_divisor, tail="drop"), "the tail is dropped"),
    ("train_epoch", _loop(_right_divisor, tail="leak"), "leak into the first update of the next epoch"),
    ("train_epoch", _loop(_right_divisor, zero="never"), "still holds the gradients of the first"),
    ("train_epoch", _loop(_right_divisor, zero="before"), "zero_grad() after step(), not before it"),
    ("train_epoch", _loop(_right_divisor, zero="each micro-batch"), "Only the last micro-batch"),
    ("train_epoch", _loop(lambda w, b, s: 2.5 * _tokens(w)), "Update 1 does not get the gradient"),
    ("train_epoch", _steps_each_time, "steps after every micro-batch"),
    ("train_epoch", _never_steps, "never calls optimizer.step()"),
    ("train_epoch", _two_windows_at_once, "are 6 updates, and it makes 4"),
    ("train_epoch", _no_count, "Return their number, which is 3"),
    ("accelerate_loss", _mean_of_micro_batch, "Both divisions are still to be undone"),
    ("accelerate_loss", _no_steps, "multiply by `steps` to undo it"),
    ("accelerate_loss", _no_processes, "multiply by `processes` to undo it"),
    ("accelerate_loss", _divided_again, "divides by `steps` already"),
    ("accelerate_loss", _processes_divided, "DDP divides by `processes` already"),
    ("accelerate_loss", _no_tokens, "Divide by the label tokens"),
    ("accelerate_loss", _off_by_one, "it is 1.20, not 1.23"),
    ("accelerate_loss", _nothing, "returns None"),
]


test_the_solution_passes_and_the_stub_does_not, test_a_mistake_gets_its_hint = exercise_tests(
    checks, STUBS, SOLUTIONS, WRONG
)


def test_other_right_answers_pass(capsys):
    """By the model's own mean loss, by `num_items_in_batch`, and with the gradients cleared before each window."""
    by_mean = _loop(_right_divisor, loss=lambda model, batch: model(**batch).loss * _tokens([batch]))

    def by_count(model, micro_batches, optimizer, steps):
        updates = 0
        for start in range(0, len(micro_batches), steps):
            window = micro_batches[start : start + steps]
            optimizer.zero_grad()
            for batch in window:
                model(**batch, num_items_in_batch=torch.tensor(_tokens(window))).loss.backward()
            optimizer.step()
            updates += 1
        return updates

    for function in (by_mean, by_count):
        assert ": correct." in _said(capsys, "train_epoch", function)


def test_an_error_in_the_answer_is_reported_and_not_raised(capsys):
    assert "your function raised TypeError" in _said(capsys, "window_loss", lambda logits, labels: logits / 2)
