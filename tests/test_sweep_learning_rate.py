"""The learning-rate sweep: what one run is, what is stored, and that a stopped sweep loses nothing."""

import itertools
import json
import math
import sys
import tempfile
from dataclasses import astuple, replace
from functools import partial

from helpers import data, evaluation, models
from helpers.labs import learning_rate
from helpers.labs.learning_rate import FULL, LORA, PARTS, QV, QV_80, RESULTS, SMOLLM2, Run
from helpers.makers import pretrain_tiny, small_world
from helpers.makers import sweep_learning_rate as sweep

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import TrainerCallback, set_seed

pytestmark = pytest.mark.slow
SHORT = replace(LORA, r=4, alpha=8.0, learning_rate=5e-3, batch_size=4, steps=4, warmup=0.25, schedule="linear")


class StopAfter(TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.steps


def first_losses(run, steps, folder):
    trainer = learning_rate.build(run, folder)
    trainer.add_callback(StopAfter(steps))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trainable(run, folder):
    return sum(p.numel() for p in learning_rate.build(run, folder).model.parameters() if p.requires_grad)


# One run


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_equals_a_loop_by_hand(method, tmp_path):
    run = SHORT if method == "lora" else replace(SHORT, method="full", r=0, alpha=0.0, targets="everything")
    result = learning_rate.train_once(run)

    batches = list(learning_rate.build(run, tmp_path).get_train_dataloader())[: run.steps]
    set_seed(run.seed)
    model = models.load_base("tiny", dtype=torch.float32)
    if method == "lora":
        layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=layers, task_type="CAUSAL_LM"))
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    losses = []
    for batch, share in zip(batches, (0, 1, 2 / 3, 1 / 3), strict=True):  # one step of warm-up, then linear to zero
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = share * run.learning_rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert result["losses"] == pytest.approx(losses, rel=1e-3)
    validation = evaluation.completion_loss(model, models.load_tokenizer("tiny"), data.load_commands("validation"))
    assert result["validation_loss"] == pytest.approx(validation, rel=1e-3)
    assert not result["diverged"]


def test_what_is_trained(tmp_path):
    everything = sum(p.numel() for p in models.load_base("tiny").parameters())
    assert trainable(FULL, tmp_path) == everything
    of_all_layers = trainable(LORA, tmp_path)
    assert 0 < trainable(QV, tmp_path) < of_all_layers < everything
    assert trainable(QV_80, tmp_path) == of_all_layers


def test_rslora_is_another_alpha(tmp_path):
    with_rslora = first_losses(replace(SHORT, r=16, alpha=8.0, rslora=True), 4, tmp_path)
    assert with_rslora == first_losses(replace(SHORT, r=16, alpha=32.0), 4, tmp_path)
    assert with_rslora != first_losses(replace(SHORT, r=16, alpha=8.0), 4, tmp_path)


def test_the_schedules_and_the_untrained_base(tmp_path):
    def rates(run):
        trainer = learning_rate.build(run, tmp_path)
        trainer.train()
        return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]

    run = replace(SHORT, learning_rate=1.0, base="untrained")
    assert rates(replace(run, schedule="constant")) == [0.0, 1.0, 1.0, 1.0]
    assert rates(replace(run, warmup=0.0)) == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert rates(replace(run, warmup=0.0, schedule="cosine"))[2] == pytest.approx(0.5)
    untrained = first_losses(replace(run, learning_rate=1e-3), 1, tmp_path)[0]
    assert untrained == pytest.approx(math.log(len(models.load_tokenizer("tiny"))), rel=0.05)


def test_a_run_that_explodes_is_marked_and_can_be_stored():
    result = learning_rate.train_once(replace(FULL, learning_rate=1e30, steps=3, batch_size=2, warmup=0.0))
    assert result["diverged"]
    assert result["losses"][0] is not None
    assert result["losses"][-1] is None
    assert result["validation_loss"] is None
    assert result["base_text_loss"] is None
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("wrong", [{"method": "lorra"}, {"base": "trained"}, {"schedule": "exponential"}])
def test_a_field_without_meaning_is_an_error(wrong, tmp_path):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name}='{wrong[name]}': choose one of "):
        learning_rate.build(replace(SHORT, **wrong), tmp_path)


def test_the_base_text_loss_is_that_of_the_pretraining_record():
    model, tokenizer = models.load_base("tiny"), models.load_tokenizer("tiny")
    loss = learning_rate.base_text_loss(model, tokenizer)
    assert loss == pytest.approx(math.log(pretrain_tiny.held_out_perplexity(model, tokenizer, count=100)), abs=1e-5)
    recorded = json.loads((models.TINY / "training.json").read_text())["held_out_perplexity"]["trained"]
    assert loss == pytest.approx(math.log(recorded), abs=0.05)  # which is of 400 documents
    model.model.norm.weight.data.fill_(math.inf)
    assert learning_rate.base_text_loss(model, tokenizer) is None


def test_the_held_out_text_is_that_of_the_pretraining():
    stored = [json.loads(line) for line in small_world.HELD_OUT.read_text(encoding="utf-8").splitlines()]
    assert stored == list(itertools.islice(small_world.documents(small_world.HELD_OUT_SEED), 100))


def test_the_untrained_base_has_the_shape_and_the_start_of_the_pretrained_one():
    tokenizer = models.load_tokenizer("tiny")
    set_seed(3)
    new = pretrain_tiny.new_model(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id).state_dict()
    run = replace(FULL, base="untrained", seed=3)
    with tempfile.TemporaryDirectory() as folder:
        built = learning_rate.build(run, folder).model.state_dict()
    assert new.keys() == built.keys()
    assert all(torch.equal(new[name], built[name].cpu()) for name in new)


# What is stored


def stored_lines():
    return [json.loads(line) for line in (RESULTS / "runs.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_run_of_the_grid_is_stored_once():
    runs = [Run(**{name: line[name] for name in Run.__dataclass_fields__}) for line in stored_lines()]
    assert len(runs) == len(set(runs))
    assert set(runs) == {run for part in PARTS.values() for run in part}
    assert runs == sorted(runs, key=astuple)


@pytest.mark.parametrize("part", PARTS)
def test_the_stored_losses_are_whole(part):
    runs = learning_rate.load_runs(part)
    assert len(runs) == len(PARTS[part])
    assert (runs["losses"].str.len() == runs["steps"]).all()
    finite = runs["validation_loss"].notna()
    assert (finite | runs["diverged"]).all()
    assert (runs["diverged"] == (~finite | (runs["validation_loss"] > runs["losses"].str[0]))).all()
    assert (runs["base_text_loss"].notna() == (runs["model"] == "tiny")).all()


def test_the_record_says_how_and_names_nobody():
    text = (RESULTS / "record.json").read_text(encoding="utf-8")
    sessions = json.loads(text)
    assert sum(session["runs"] for session in sessions) == len(stored_lines())
    for session in sessions:
        assert set(session) >= {"parts", "minutes", "date", "machine", "cores", "threads", "torch", "peft"}
        assert set(session["parts"]) <= set(PARTS)
    assert "/" not in text


@pytest.mark.parametrize("run", [LORA, replace(FULL, learning_rate=5e-4), replace(QV, learning_rate=1e-2)])
def test_a_stored_run_begins_as_it_does_today(run, tmp_path):
    (line,) = [line for line in stored_lines() if all(line[name] == value for name, value in vars(run).items())]
    assert first_losses(run, 8, tmp_path) == pytest.approx(line["losses"][:8], rel=0.01)


# The sweep


@pytest.fixture
def short_parts(monkeypatch):
    """Two small parts with a run in common, and runs that take no time."""
    runs = [replace(SMOLLM2, seed=seed) for seed in range(5)]
    monkeypatch.setattr(learning_rate, "PARTS", {"low": runs[:3], "high": runs[2:]})
    done = []

    def train_once(run, fail_at=None):
        if run.seed == fail_at:
            raise KeyboardInterrupt
        done.append(run.seed)
        return {"validation_loss": 0.5, "base_text_loss": None, "diverged": False, "losses": [1.0]}

    monkeypatch.setattr(learning_rate, "train_once", train_once)
    return monkeypatch, train_once, done


def test_a_run_is_done_once(short_parts, tmp_path):
    *_, done = short_parts
    sweep.sweep(["high"], tmp_path)
    sweep.sweep(["high", "low"], tmp_path)
    sweep.sweep(["high", "low"], tmp_path)
    assert done == [2, 3, 4, 0, 1]
    stored = [json.loads(line)["seed"] for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert stored == [0, 1, 2, 3, 4]
    assert list(learning_rate.load_runs("high", tmp_path)["seed"]) == [2, 3, 4]
    assert [session["runs"] for session in json.loads((tmp_path / "record.json").read_text())] == [3, 2]


def test_a_stopped_sweep_goes_on(short_parts, tmp_path):
    monkeypatch, train_once, done = short_parts
    monkeypatch.setattr(learning_rate, "train_once", partial(train_once, fail_at=2))
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(["low", "high"], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["record.json", "runs.jsonl"]
    with pytest.raises(ValueError, match=r"1 of the 3 runs of 'low' are not in .*--part low"):
        learning_rate.load_runs("low", tmp_path)
    monkeypatch.setattr(learning_rate, "train_once", train_once)
    sweep.sweep(["low", "high"], tmp_path)
    assert done == [0, 1, 2, 3, 4]


def test_a_file_is_replaced_whole_or_not_at_all(short_parts, tmp_path, monkeypatch):
    sweep.sweep(["low"], tmp_path)
    before = (tmp_path / "runs.jsonl").read_text()
    monkeypatch.setattr(type(tmp_path), "replace", lambda *paths: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        sweep.sweep(["high"], tmp_path)
    assert (tmp_path / "runs.jsonl").read_text() == before


def test_a_part_that_does_not_exist_is_an_error(tmp_path, monkeypatch, capsys):
    for function in (learning_rate.load_runs, lambda part: sweep.sweep([part], tmp_path)):
        with pytest.raises(ValueError, match="part='ranks' does not exist; choose among rates, rank"):
            function("ranks")
    monkeypatch.setattr(sys, "argv", ["sweep_learning_rate", "--part", "ranks"])
    with pytest.raises(SystemExit):
        sweep.main()
    assert "invalid choice: 'ranks'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_line(short_parts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sweep_learning_rate", "--part", "low", "--output", str(tmp_path / "new")])
    sweep.main()
    assert "3 of 3 runs to do" in capsys.readouterr().out
    assert len(learning_rate.load_runs("low", tmp_path / "new")) == 3
