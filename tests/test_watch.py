"""helpers.watch: what stops a run, what it warns of, and that it changes nothing."""

import contextlib
import math
import warnings

from helpers.labs import clinic
from helpers.watch import DiagnosticsCallback

import pytest
import torch
from datasets import Dataset, IterableDataset
from shared import llama, same
from torch import nn

SETTINGS = {"max_steps": 4, "per_device_train_batch_size": 2}


def small(**options):
    sizes = {"vocab_size": 768, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    return clinic.new_adapter(llama(pad_token_id=1, eos_token_id=0, **sizes), **options)


def watched(folder, model=None, **options):
    watch = DiagnosticsCallback()
    trainer = clinic.new_trainer(folder, small() if model is None else model, **(SETTINGS | options))
    trainer.add_callback(watch)
    return trainer, watch


def train(trainer, **options):
    with warnings.catch_warnings(action="ignore"):
        trainer.train(**options)


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def codes(watch):
    return [finding.code for finding in watch.findings]


def first_trained(model):
    return next(name for name, p in model.named_parameters() if p.requires_grad)


def poison(model, name, backward, value=float("nan")):
    """Make the gradient of one matrix inf or NaN in one backward pass; diagnose makes the first before the run."""
    calls = [0]

    def spoil(grad):
        calls[0] += 1
        return torch.full_like(grad, value) if calls[0] == backward else grad

    dict(model.named_parameters())[name].register_hook(spoil)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2, "max_steps": 2, "weight_decay": 0.1, "lr_scheduler_type": "linear"},
        pytest.param({"gradient_checkpointing": True, "max_steps": 2}, marks=pytest.mark.slow),
        pytest.param({"bf16": True, "max_steps": 2}, marks=pytest.mark.slow),
        pytest.param({"eval_strategy": "steps", "eval_steps": 2}, marks=pytest.mark.slow),
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_healthy_run_has_no_finding_and_the_same_weights_and_log(options, tmp_path):
    plain = clinic.new_trainer(tmp_path, small(lora_dropout=0.1), **(SETTINGS | options))
    plain.train()
    trainer, watch = watched(tmp_path, small(lora_dropout=0.1), **options)
    with warnings.catch_warnings(action="error", category=UserWarning, append=True):
        trainer.train()
    assert watch.findings == []
    assert same(weights(trainer), weights(plain))
    for field in ("loss", "grad_norm", "eval_loss"):
        assert [e.get(field) for e in plain.state.log_history] == [e.get(field) for e in trainer.state.log_history]


@pytest.mark.slow
def test_modules_to_save_and_an_embedding_adapter_are_healthy(tmp_path):
    for options in ({"modules_to_save": ["norm"]}, {"target_modules": ["embed_tokens", "q_proj"]}):
        trainer, watch = watched(tmp_path, small(**options), max_steps=11)
        train(trainer)
        assert watch.findings == []


@pytest.mark.slow
def test_a_resumed_run_is_the_same_and_has_no_finding(tmp_path):
    whole, _ = watched(tmp_path / "whole", small(lora_dropout=0.1), save_strategy="steps", save_steps=2)
    train(whole)
    again, watch = watched(tmp_path / "whole", small(lora_dropout=0.1))
    train(again, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert watch.findings == []
    assert same(weights(again), weights(whole))


@pytest.mark.parametrize("stops", [False, True])
def test_hooks_are_gone_after_the_run(stops, tmp_path):
    trainer, _ = watched(tmp_path)
    if stops:
        poison(trainer.model, first_trained(trainer.model), backward=2)
    with pytest.raises(FloatingPointError) if stops else contextlib.nullcontext():
        train(trainer)
    assert not trainer.model._forward_hooks
    assert not any(getattr(p, "_post_accumulate_grad_hooks", None) for p in trainer.model.parameters())


# What stops a run


@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.slow)])
@pytest.mark.parametrize(("window", "backward", "place"), [(1, 3, "2, micro-batch 1"), (2, 5, "2, micro-batch 2"),
                                                           (2, 4, "2, micro-batch 1")])  # fmt: skip
def test_a_gradient_that_is_not_finite_stops_before_the_update(value, window, backward, place, tmp_path):
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_B.default.weight"
    trainer, _ = watched(tmp_path, gradient_accumulation_steps=window)
    seen = {}
    trainer.model.register_forward_hook(lambda *_: seen.update(weights(trainer)))
    poison(trainer.model, name, backward, value)
    with pytest.raises(
        FloatingPointError, match=f"^update {place} .*: the gradient of {name} is not finite, the first of"
    ):
        train(trainer)
    assert same(weights(trainer), seen)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_the_first_parameter_of_the_backward_pass_is_named_though_all_are_broken(tmp_path):
    """One NaN spreads from layer 1 to all that is below it, and clipping spreads it to the rest: layer 1 is named."""
    trainer, _ = watched(tmp_path)
    layer = trainer.model.get_base_model().model.layers[1].mlp.down_proj
    calls = [0]

    def spoil(module, grad_input, grad_output):
        calls[0] += 1
        return (grad_input[0] * math.nan,) if calls[0] == 3 else None

    layer.register_full_backward_hook(spoil)
    with pytest.raises(FloatingPointError, match=r"update 2.* of .*layers\.1\.mlp\.(up|gate)_proj\.lora_[AB]"):
        train(trainer)


def test_the_message_names_the_rows_of_the_batch(tmp_path):
    trainer, _ = watched(tmp_path, per_device_train_batch_size=2)
    batches = []
    trainer.model.register_forward_pre_hook(lambda model, args, kwargs: batches.append(kwargs), with_kwargs=True)
    poison(trainer.model, first_trained(trainer.model), backward=3)
    with pytest.raises(FloatingPointError) as caught:
        train(trainer)
    ids, mask = batches[-1]["input_ids"], batches[-1]["attention_mask"].bool()
    rows = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
    numbers = [number for number, row in enumerate(trainer.train_dataset) if row["input_ids"] in rows]
    assert len(numbers) == 2
    assert f"(rows {numbers[0]}, {numbers[1]} of the training data, counted from 0)" in str(caught.value)


def test_a_loss_that_is_not_finite_says_whether_weights_or_rows_are_to_blame(tmp_path):
    trainer, _ = watched(tmp_path)
    calls = [0]

    def overflow(module, inputs, output):  # lasts for one forward pass, the second of the run
        calls[0] += 1
        return output * math.inf if calls[0] == 3 else output

    trainer.model.get_base_model().lm_head.register_forward_hook(overflow)
    with pytest.raises(
        FloatingPointError, match=r"^update 2, micro-batch 1 \(rows .*: the loss is nan; every parameter is"
    ):
        train(trainer)

    trainer, _ = watched(tmp_path, learning_rate=1e30, warmup_steps=0)  # finite gradients, weights that overflow
    with pytest.raises(FloatingPointError, match=r"update 2, .*the loss is nan|update 2, .*gradient of"):
        train(trainer)

    trainer, _ = watched(tmp_path)
    name, parameter = next((n, p) for n, p in trainer.model.named_parameters() if "lora_B" in n)
    with torch.no_grad():
        parameter[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="1 parameters hold inf or NaN") as caught:
        train(trainer)
    assert name in str(caught.value)


def test_the_labels_of_every_batch_are_looked_at_of_a_stream_too(tmp_path):
    rows = clinic.encoded().select(range(6)).to_list()
    rows[5]["labels"] = [-100] * len(rows[5]["labels"])
    more = {"train_sampling_strategy": "sequential", "max_steps": 3}
    trainer, watch = watched(tmp_path, rows=Dataset.from_list(rows), **more)
    train(trainer)
    [finding] = watch.findings
    assert finding.message == "update 3, micro-batch 1: 1 of 2 rows of the batch have no label: 1"
    without_eos = [row | {"labels": [*row["labels"][:-1], -100]} for row in rows[:4]]
    trainer, watch = watched(tmp_path, rows=IterableDataset.from_generator(lambda: iter(without_eos)), max_steps=1)
    train(trainer)
    assert codes(watch) == ["eos-not-learned"]


def test_a_batch_without_labels_among_good_ones_is_named(tmp_path):
    rows = clinic.encoded().select(range(8)).to_list()
    rows[5]["labels"] = [-100] * len(rows[5]["labels"])
    trainer, _ = watched(tmp_path, rows=Dataset.from_list(rows), per_device_train_batch_size=1, max_steps=8)
    with pytest.raises(FloatingPointError, match=r"\(rows 5 of the training data, counted from 0\): .*no label counts"):
        train(trainer)


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 1},
        {"max_steps": 3, "save_strategy": "steps", "save_steps": 1},
        {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch"},
    ],
    ids=["at the end", "at a save", "at an epoch's end"],
)
def test_weights_that_an_update_has_ruined_are_not_saved(options, tmp_path):
    def ruin(optimizer, *_):
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0][0, 0] = math.inf

    rows = clinic.encoded().select(range(2))  # an epoch of one update
    trainer, _ = watched(tmp_path, rows=rows, **options)
    trainer.create_optimizer().register_step_post_hook(ruin)
    with pytest.raises(FloatingPointError, match="after update 1: 1 parameters hold inf or NaN, the first is"):
        train(trainer)
    assert not list(tmp_path.glob("checkpoint-*"))


# What it warns of (the rest is in test_clinic.py)


def test_findings_are_warnings_with_a_remedy(tmp_path):
    model = small()
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1e-3)
    trainer, watch = watched(tmp_path, model, more={"optimizers": (optimizer, None)}, warmup_steps=0)
    with pytest.warns(UserWarning, match="adapter-not-moving: after 4 updates at a rate above 0, 100%") as caught:
        trainer.train()
    assert codes(watch) == ["not-in-optimizer", "adapter-not-moving"]
    assert all(finding.remedy in "".join(str(w.message) for w in caught) for finding in watch.findings)


def test_an_adapter_that_moves_in_part_is_reported(tmp_path):
    """Half of the matrices are in the optimizer: half of the entries do not move."""
    model = small()
    held, stuck = ([p for name, p in model.named_parameters() if half in name] for half in ("lora_B", "lora_A"))
    more = {"optimizers": (torch.optim.AdamW(held, lr=1e-3), None)}
    trainer, watch = watched(tmp_path, model, more=more, max_steps=10, warmup_steps=0)
    train(trainer)
    message = next(finding.message for finding in watch.findings if finding.code == "adapter-not-moving")
    numbers = [sum(p.numel() for p in half) for half in (held, stuck)]
    assert f"after 10 updates at a rate above 0, {numbers[1] / sum(numbers):.0%} of" in message


def test_updates_at_a_rate_of_zero_are_no_standstill(tmp_path):
    """The schedule starts with three updates at 0, and these do not count."""
    model = small()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step >= 3))
    trainer, watch = watched(tmp_path, model, more={"optimizers": (optimizer, schedule)}, max_steps=3)
    train(trainer)
    assert watch.findings == []


@pytest.mark.slow
def test_resumed_with_other_settings(tmp_path):
    first, _ = watched(tmp_path, save_strategy="steps", save_steps=2, max_steps=2, weight_decay=0.5)
    train(first)
    for changes, words in (
        ({"model": small(lora_alpha=160)}, ["lora_alpha=160 is used, and the checkpoint was made with 16"]),
        ({"learning_rate": 0.1}, ["learning_rate=0.1 is not used, the checkpoint's 0.005 is"]),
        ({"weight_decay": 0.7}, ["weight_decay=0.7 is not used, the checkpoint's 0.5 is"]),
        # The Trainer's group of biases and norms has none, and does not hide that the other has the checkpoint's.
        ({"weight_decay": 0.0}, ["weight_decay=0 is not used, the checkpoint's 0.5 is"]),
        ({}, []),
    ):
        trainer, watch = watched(tmp_path, **({"weight_decay": 0.5} | changes))
        train(trainer, resume_from_checkpoint=True)
        assert [finding.message for finding in watch.findings] == words
        assert codes(watch) == ["settings-ignored"] * len(words)


@pytest.mark.slow
def test_an_evaluation_without_dropout_or_in_eval_mode_is_fine(tmp_path):
    for mended, dropout in ((True, 0.3), (False, 0.0)):
        model = small(lora_dropout=dropout)
        model.get_base_model().model.layers[0].dropout = nn.Dropout(0.0)  # as many models have it: it does nothing
        trainer, watch = watched(tmp_path, model)
        trainer.add_callback(clinic.OwnEvaluation(switch_mode=mended))
        train(trainer)
        assert watch.findings == []


def test_a_leak_counts_the_rows(tmp_path):
    rows = clinic.encoded().select(range(6))
    held_out = Dataset.from_list([*clinic.encoded("validation").select(range(3)).to_list(), rows[4], rows[1]])
    trainer, watch = watched(tmp_path, rows=rows, more={"eval_dataset": held_out}, eval_strategy="steps", eval_steps=2)
    train(trainer)
    assert [finding.message for finding in watch.findings] == [
        "2 of 5 evaluation rows are in the training data too: 3, 4"
    ]


class CountedRows(torch.utils.data.Dataset):
    """Rows that count how often they are read."""

    def __init__(self, rows):
        self.rows, self.reads = rows, 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        self.reads += 1
        return self.rows[i]


@pytest.mark.slow
def test_the_training_data_is_read_once_for_all_evaluations_and_anew_in_the_next_run(tmp_path):
    rows = clinic.encoded().to_list()
    trained = CountedRows(rows[:20])
    trainer, watch = watched(tmp_path, rows=trained, eval_strategy="steps", eval_steps=1, max_steps=4)
    trainer.evaluate()  # before there are training data to compare with
    train(trainer)
    assert 28 <= trained.reads <= 40  # four batches of two, the first rows once more, and all rows once
    assert watch.findings == []
    trainer.train_dataset = Dataset.from_list(clinic.encoded("validation").select(range(3)).to_list())
    train(trainer)
    assert codes(watch) == ["evaluation-leak"]


@pytest.mark.slow
def test_data_that_cannot_be_indexed_is_watched_without_a_first_batch(tmp_path):
    rows = clinic.encoded().select(range(8)).to_list()
    stream = Dataset.from_list(rows).to_iterable_dataset()
    trainer, watch = watched(tmp_path, rows=stream, max_steps=2)
    train(trainer)
    assert watch.findings == []
    trainer, watch = watched(tmp_path, rows=stream, max_steps=2)
    poison(trainer.model, first_trained(trainer.model), backward=1)  # there is no pass of diagnose here
    with pytest.raises(FloatingPointError, match=r"^update 1, micro-batch 1: the gradient"):
        train(trainer)
