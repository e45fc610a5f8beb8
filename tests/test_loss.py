import copy

from helpers.loss import accumulated_step, windows

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from shared import llama
from torch.nn.functional import cross_entropy, log_softmax
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}


def with_lora(model):
    dtype = model.dtype
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(model, config).to(dtype)


def row(length, labels, seed):
    """A row of `length` random tokens, of which the last `labels` are labels."""
    ids = torch.randint(3, 128, (length,), generator=torch.Generator().manual_seed(seed))
    return ids, torch.cat([torch.full((length - labels,), -100), ids[length - labels :]])


def collate(rows, extra=0, left=False):
    """Pad the rows to the longest and `extra` more, on the right or on the left.

    On the left, a label on a row's first token would be predicted from the padding before it, so it is masked.
    """
    longest = max(len(ids) for ids, _ in rows) + extra
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, labels in rows:
        padding = longest - len(ids)
        labels = torch.cat([labels.new_tensor([-100]), labels[1:]]) if left else labels
        for key, value, fill in zip(batch, (ids, torch.ones_like(ids), labels), (0, 0, -100), strict=True):
            sides = (padding, 0) if left else (0, padding)
            batch[key].append(torch.nn.functional.pad(value, sides, value=fill))
    return {key: torch.stack(values) for key, values in batch.items()}


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def expected(model, rows):
    """Loss and gradients of all rows together, row by row without padding, from the definition."""
    losses = []
    for ids, labels in rows:
        log_probabilities = log_softmax(model(input_ids=ids[None]).logits[0], dim=-1)
        losses += [-log_probabilities[t - 1, labels[t]] for t in range(1, len(ids)) if labels[t] != -100]
    loss = torch.stack(losses).mean()
    gradients = torch.autograd.grad(loss, list(trainable(model).values()))
    return loss.item(), dict(zip(trainable(model), gradients, strict=True))


def step(model, micro_batches, lr=0.5, **options):
    """Run accumulated_step with SGD; return its loss and the gradients that the optimizer saw."""
    optimizer = torch.optim.SGD(trainable(model).values(), lr=lr)
    seen = {}
    optimizer.register_step_pre_hook(
        lambda *_: seen.update({name: p.grad.clone() for name, p in trainable(model).items()})
    )
    loss = accumulated_step(model, micro_batches, optimizer, **options)
    return loss, seen


def error(actual, wanted):
    """Relative Euclidean distance of two dictionaries of tensors, taken as one vector."""
    difference = torch.cat([(actual[name] - wanted[name]).detach().double().flatten() for name in wanted])
    return (
        difference.norm() / torch.cat([value.detach().double().flatten() for value in wanted.values()]).norm()
    ).item()


BASES = {
    (dtype, peft): with_lora(llama(dtype)) if peft else llama(dtype) for dtype in TOLERANCE for peft in (False, True)
}
ROWS = st.lists(
    st.integers(2, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(0, 99))),
    min_size=1,
    max_size=7,
).filter(lambda rows: any(labels > 0 for _, labels, _ in rows))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("peft", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "peft"])
@given(ROWS, st.integers(1, 4), st.lists(st.integers(0, 3), min_size=7, max_size=7), st.booleans())
@settings(max_examples=20, deadline=None, derandomize=True)
def test_equals_one_large_batch_however_it_is_split_and_padded(dtype, peft, shapes, size, extra, left):
    model = copy.deepcopy(BASES[dtype, peft])
    rows = [row(*shape) for shape in shapes]
    # Padding on the left shifts the positions, and transformers computes rotary angles in fp32, in an fp64 model too.
    left = left and dtype == torch.float32
    micro_batches = [
        collate(rows[start : start + size], extra[number], left)
        for number, start in enumerate(range(0, len(rows), size))
    ]
    loss, gradients = expected(model, rows)
    before = {name: p.detach().clone() for name, p in trainable(model).items()}

    got_loss, got = step(model, micro_batches)

    assert got_loss == pytest.approx(loss, rel=TOLERANCE[dtype])
    assert error(got, gradients) < TOLERANCE[dtype]
    assert error(trainable(model), {name: before[name] - 0.5 * gradients[name] for name in before}) < TOLERANCE[dtype]
    assert all(p.grad is None for p in model.parameters())


def test_clips_the_gradient_of_the_whole_window():
    model = BASES[torch.float64, True]
    rows = [row(9, 8, 0), row(5, 1, 1), row(7, 3, 2)]
    _, gradients = expected(model, rows)
    norm = torch.stack([g.norm() for g in gradients.values()]).norm().item()
    for limit in (norm / 3, norm * 3):
        _, clipped = step(copy.deepcopy(model), [collate([r]) for r in rows], max_grad_norm=limit)
        factor = min(1.0, limit / norm)
        assert error(clipped, {name: factor * g for name, g in gradients.items()}) < 1e-5  # torch adds 1e-6 to the norm


def test_sums_the_token_losses_of_a_bf16_model_in_fp32():
    model = llama(torch.bfloat16)
    batch = collate([row(60, 59, seed) for seed in range(4)])
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits.double()
    wanted = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).item()
    assert step(model, [batch])[0] == pytest.approx(wanted, rel=1e-5)


def test_leaves_the_callers_batches_and_the_models_mode_alone():
    for mode in (True, False):
        model = llama().train(mode)
        batch = collate([row(6, 4, 0)])
        kept = copy.deepcopy(batch)
        step(model, [batch])
        assert batch.keys() == kept.keys()
        assert all(torch.equal(batch[key], kept[key]) for key in kept)
        assert model.training is mode


def unchanged_after_error(model, micro_batches, match, **options):
    before = copy.deepcopy(model.state_dict())
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=match):
        accumulated_step(model, micro_batches, optimizer, **options)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not optimizer.state
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)


def test_refuses_a_window_without_labels():
    only_first = collate([row(5, 5, 0)])
    only_first["labels"][:, 1:] = -100  # a label in the first column is never predicted
    for micro_batches in ([], [collate([row(5, 0, 0)])], [only_first]):
        unchanged_after_error(llama(), micro_batches, "no label token.*truncation")
    unlabelled = collate([row(5, 2, 0)])
    del unlabelled["labels"]
    unchanged_after_error(llama(), [collate([row(5, 2, 0)]), unlabelled], "no 'labels'")


def test_refuses_leftover_gradients_but_not_zeros():
    model = llama()
    model(**collate([row(5, 2, 0)])).loss.backward()
    unchanged_after_error(model, [collate([row(5, 2, 0)])], r"embed_tokens.*zero_grad")
    model.zero_grad(set_to_none=False)
    step(model, [collate([row(5, 2, 0)])])


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan")])
def test_refuses_a_norm_that_would_erase_the_gradient(norm):
    unchanged_after_error(llama(), [collate([row(5, 2, 0)])], "max_grad_norm", max_grad_norm=norm)


def test_windows_keep_every_micro_batch_and_the_tail():
    loader = DataLoader(list(range(23)), batch_size=3)  # 8 micro-batches, the last of 2 rows
    for _ in range(2):
        found = list(windows(loader, 3))
        assert [len(window) for window in found] == [3, 3, 2]
        assert [int(i) for window in found for batch in window for i in batch] == list(range(23))
    assert list(windows([1, 2, 3, 4], 2)) == [[1, 2], [3, 4]]
    assert list(windows([1, 2, 3], 1)) == [[1], [2], [3]]
    assert list(windows([1, 2], 5)) == [[1, 2]]
    assert list(windows([], 5)) == []


def test_windows_read_no_further_than_asked():
    taken = []
    found = windows((taken.append(i) or i for i in range(10)), 4)
    assert next(found) == [0, 1, 2, 3]
    assert taken == [0, 1, 2, 3]


@pytest.mark.parametrize("steps", [0, -1])
def test_windows_refuse_steps_below_one(steps):
    with pytest.raises(ValueError, match="at least one"):
        next(windows([1], steps))


class InOrder(Trainer):
    """A Trainer that takes the micro-batches as they come."""

    def get_train_dataloader(self):
        return self.accelerator.prepare(DataLoader(self.train_dataset, batch_size=2, collate_fn=collate))


@pytest.mark.parametrize("peft", [False, True], ids=["plain", "peft"])
def test_two_epochs_end_at_the_trainers_weights(peft, tmp_path):
    rows = [
        row(length, labels, length) for length, labels in zip(range(4, 17), [1, 4, 2, 6, 3, 8] * 2 + [15], strict=True)
    ]
    # No row has a label at its first position: before Transformers 5.10 the Trainer counts that one too.
    base = BASES[torch.float32, peft]
    arguments = TrainingArguments(
        output_dir=tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,  # 7 micro-batches: windows of 3, 3 and 1
        num_train_epochs=2,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        max_grad_norm=0.5,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        label_names=["labels"],
    )
    with_trainer = copy.deepcopy(base)
    InOrder(with_trainer, arguments, train_dataset=rows).train()

    ours, textbook = copy.deepcopy(base).train(), copy.deepcopy(base).train()
    loader = DataLoader(rows, batch_size=2, collate_fn=collate)
    optimizer = torch.optim.AdamW(trainable(ours).values(), lr=1e-3, weight_decay=0.0)
    textbook_optimizer = torch.optim.AdamW(trainable(textbook).values(), lr=1e-3, weight_decay=0.0)
    for _ in range(2):
        for window in windows(loader, 3):
            accumulated_step(ours, window, optimizer, max_grad_norm=0.5)
            for batch in window:
                (textbook(**batch).loss / len(window)).backward()  # the mean of means
            torch.nn.utils.clip_grad_norm_(textbook.parameters(), 0.5)
            textbook_optimizer.step()
            textbook_optimizer.zero_grad()

    def moved(model):
        return {name: p.detach() - trainable(base)[name].detach() for name, p in trainable(model).items()}

    assert error(moved(ours), moved(with_trainer)) < 1e-4
    assert error(moved(textbook), moved(with_trainer)) > 0.1


@pytest.mark.cuda
def test_moves_the_batches_to_the_models_device():
    rows = [row(9, 8, 0), row(5, 1, 1), row(7, 3, 2)]
    loss, gradients = expected(BASES[torch.float64, True], rows)
    got_loss, got = step(copy.deepcopy(BASES[torch.float64, True]).cuda(), [collate(rows[:2]), collate(rows[2:])])
    assert got_loss == pytest.approx(loss)
    assert error({name: g.cpu() for name, g in got.items()}, gradients) < 1e-6
