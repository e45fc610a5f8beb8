"""Training arguments and the Trainer."""

from helpers import data, evaluation, training
from helpers.hardware import Profile

import pytest
import shared
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@pytest.fixture
def run(tmp_path):
    """Return a function that builds a Trainer over a few rows of the sample task on tiny."""

    def build(rows=16, eval_rows=0, **overrides):
        settings = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 2, "save_strategy": "no"}
        held_out = shared.encoded(eval_rows, "validation") if eval_rows else None
        return shared.trainer(tmp_path / "run", rows=rows, held_out=held_out, **settings | overrides)

    return build


def test_training_prints_readable_lines_and_nothing_else(run, capsys):
    trainer = run(eval_rows=4, eval_strategy="steps", eval_steps=2)
    assert (type(trainer), type(trainer.args)) == (transformers.Trainer, transformers.TrainingArguments)
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    log = trainer.state.log_history
    losses = [f"loss {entry['loss']:.2f}" if "loss" in entry else f"validation loss {entry['eval_loss']:.2f}"
              for entry in log if "loss" in entry or "eval_loss" in entry]  # fmt: skip
    assert lines == [f"step {step} of 4: {loss}" for step, loss in zip((2, 2, 4, 4), losses, strict=True)]


def test_the_loss_is_on_the_completion_only(run):
    """The Trainer's evaluation loss is the mean over completion tokens that evaluation.completion_loss computes."""
    trainer = run(eval_rows=8, per_device_eval_batch_size=8)
    rows = data.load_commands("validation").select(range(8))
    expected = evaluation.completion_loss(trainer.model, trainer.processing_class, rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_the_loss_falls_and_only_the_adapter_moves(run):
    trainer = run(max_steps=12, learning_rate=5e-3)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name


def test_overrides_replace_defaults_and_unknown_names_are_refused(tmp_path):
    arguments = training.training_arguments(tmp_path, learning_rate=0.5, lr_scheduler_type="linear")
    assert arguments.learning_rate == 0.5
    assert arguments.lr_scheduler_type == "linear"
    with pytest.raises(TypeError, match="evaluation_strategy"):
        training.training_arguments(tmp_path, evaluation_strategy="no")


@pytest.mark.parametrize(
    ("device", "dtype", "flags"),
    [
        ("cpu", torch.float32, {"use_cpu": True, "fp16": False, "bf16": False}),
        ("mps", torch.float32, {"use_cpu": False, "fp16": False, "bf16": False}),
        ("cuda", torch.float16, {"use_cpu": False, "fp16": True, "bf16": False}),
        ("cuda", torch.bfloat16, {"use_cpu": False, "fp16": False, "bf16": True}),
    ],
)
def test_precision_follows_the_profile(device, dtype, flags, monkeypatch):
    """TrainingArguments itself refuses bf16 where there is no such GPU, so its class is replaced by `dict` here."""
    monkeypatch.setattr(training, "TrainingArguments", dict)
    monkeypatch.setattr(training, "profile", lambda: Profile(device, "test", 16.0, dtype, "tiny"))
    arguments = training.training_arguments("out")
    assert {key: arguments[key] for key in flags} == flags


def test_tensorboard_reads_what_was_logged(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = run(report_to="tensorboard")
    trainer.train()
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(logged)
