"""train_pytorch and train_accelerate against the Trainer: the same losses, gradient norms, rates and weights.

On the CPU in fp32 they are equal to the last bit here. What is promised is equality to rounding: TOLERANCE, relative to
each number, and for the weights relative to the way that training has moved them.
"""

import functools
import math
import tempfile
from itertools import pairwise

from helpers import data, training
from helpers.hardware import profile
from helpers.models import load_base, load_tokenizer

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import GradientState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

TOLERANCE = 1e-5
LOOPS = {"pytorch": training.train_pytorch, "accelerate": training.train_accelerate}
tokenizer = load_tokenizer("tiny")
each_loop = pytest.mark.parametrize("loop", LOOPS)


@functools.cache
def rows():
    """Nine rows with one or two answers each: 5 micro-batches of 2, and with windows of 2 a tail."""
    parts, uneven = iter(data.load_commands("train")), []
    for count in (1, 2, 1, 1, 2, 1, 1, 1, 2):
        group = [next(parts) for _ in range(count)]
        uneven.append({key: " ".join(part[key] for part in group) for key in ("prompt", "completion")})
    return data.encode(Dataset.from_list(uneven), tokenizer)


def adapter(model):
    return torch.cat([p.detach().flatten().cpu() for p in model.parameters() if p.requires_grad])


def lora_model(seed=0, dropout=0.0, **options):
    base = load_base("tiny", dtype=torch.float32)
    base.model.layers = base.model.layers[:2]  # of four; it halves the time
    base.config.num_hidden_layers = 2
    transformers.set_seed(seed)
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "down_proj"],
        lora_dropout=dropout,
        init_lora_weights=False,  # so that every weight has a gradient from the first update on
        task_type="CAUSAL_LM",
        **options,
    )
    return get_peft_model(base, config)


def arguments(folder, **overrides):
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "learning_rate": 5e-3,
        "warmup_steps": 2,
        "max_grad_norm": 0.5,
        "optim": "adamw_torch",
        "logging_steps": 1,
        "seed": 3,
    }
    return training.training_arguments(profile(), folder, **(settings | overrides))


@functools.cache
def base_run(loop):
    """The run without overrides, made once."""
    with tempfile.TemporaryDirectory() as folder:
        return run(loop, folder)


def run(loop, folder, model_options=None, patch=None, trainer_options=None, **overrides):
    """Train tiny; return the history, the final weights, and how far these are from the start."""
    model = lora_model(**(model_options or {}))
    start, settings = adapter(model), arguments(folder, **overrides)
    if loop == "trainer":
        trainer = training.build_trainer(model, settings, tokenizer, rows(), **(trainer_options or {}))
        trainer.remove_callback(training.LossLines)
        if patch:
            patch(trainer.accelerator)
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
    else:
        history = LOOPS[loop](model, settings, tokenizer, rows())
    return history, adapter(model), (adapter(model) - start).norm().item()


def difference(one, other):
    """The largest of the relative differences of losses, norms, rates and weights of two runs."""
    (history, weights, way), (other_history, other_weights, _) = one, other
    assert [entry["step"] for entry in history] == [entry["step"] for entry in other_history]
    pairs = [
        (entry[key], other_entry[key])
        for entry, other_entry in zip(history, other_history, strict=True)
        for key in ("loss", "grad_norm", "learning_rate")
    ]
    assert way > 0.1
    pairs = [(a, b) for a, b in pairs if a != b and not (math.isnan(a) and math.isnan(b))]
    found = [abs(a - b) / max(abs(a), abs(b)) for a, b in pairs]
    return max([*found, (weights - other_weights).norm().item() / way])


CASES = {
    "dropout": {"model_options": {"dropout": 0.3}},
    "linear, no accumulation": {"lr_scheduler_type": "linear", "gradient_accumulation_steps": 1, "max_steps": 3},
    "constant with warm-up, windows longer than an epoch": {
        "lr_scheduler_type": "constant_with_warmup",
        "gradient_accumulation_steps": 7,
    },
    "stop within the second epoch": {"max_steps": 4, "warmup_steps": 0.3},
    "part of an epoch, another order": {"num_train_epochs": 1.5, "data_seed": 11, "gradient_accumulation_steps": 3},
    "no clipping, fused, other betas": {
        "max_grad_norm": 0.0,
        "optim": "adamw_torch_fused",
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-4,
    },
    "decay, but not of norms": {"weight_decay": 0.5, "model_options": {"modules_to_save": ["norm"]}},
    "options of the schedule": {
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 1e-3},
        "max_steps": 3,
    },
    "bf16": {"bf16": True, "max_steps": 2},
}


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
def test_the_loops_agree_with_the_trainer(overrides, tmp_path):
    expected = run("trainer", tmp_path, **overrides)
    for loop in LOOPS:
        assert difference(run(loop, tmp_path, **overrides), expected) <= TOLERANCE, loop


@each_loop
def test_cosine_clipping_a_tail_and_two_epochs(loop):
    """The run that the single differences are measured against; on one machine it is equal to the last bit."""
    found, expected = base_run(loop), base_run("trainer")
    assert difference(found, expected) <= TOLERANCE
    assert torch.equal(found[1], expected[1])


def test_the_comparison_covers_what_it_says():
    """Clipping is active, the windows are uneven, and the rate rises and falls."""
    history, _, _ = base_run("pytorch")
    assert len(history) == 6
    assert all(entry["grad_norm"] > 0.5 for entry in history)
    rates = [entry["learning_rate"] for entry in history]
    assert rates[0] == 0.0
    assert rates[2] == max(rates) == 5e-3
    assert rates[-1] < rates[-2] < rates[-3]
    labels = [sum(label != -100 for label in row["labels"]) for row in rows()]
    assert max(labels) > 1.8 * min(labels)


def _mean_of_means(outputs, labels, num_items_in_batch):
    return F.cross_entropy(outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten()) / 2


def _mean_of_rows(outputs, labels, num_items_in_batch):
    losses = F.cross_entropy(outputs["logits"][:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return (losses.sum(1) / (labels[:, 1:] != -100).sum(1)).sum() / 4


@pytest.mark.parametrize(
    ("single", "at_least"),
    [
        ({"weight_decay": 0.01}, 1e-4),
        ({"trainer_options": {"compute_loss_func": _mean_of_means}}, 1e-2),
        ({"trainer_options": {"compute_loss_func": _mean_of_rows}}, 1e-2),
        ({"model_options": {"seed": 1}}, 1e-2),
        ({"data_seed": 4}, 1e-2),
        ({"max_grad_norm": 0.0}, 1e-2),
        ({"lr_scheduler_type": "linear"}, 1e-2),
    ],
)
def test_the_tolerance_catches_a_single_difference(single, at_least, tmp_path):
    assert at_least >= 10 * TOLERANCE
    assert difference(run("trainer", tmp_path, **single), base_run("pytorch")) > at_least


def test_the_fused_optimizer_differs_by_rounding_only(tmp_path):
    fused, plain = run("pytorch", tmp_path, optim="adamw_torch_fused"), base_run("pytorch")
    assert not torch.equal(fused[1], plain[1])
    assert difference(fused, plain) < 1e-4


@each_loop
def test_the_loss_is_the_mean_over_the_label_tokens_of_the_window(loop, tmp_path):
    """Computed by hand for the first window, with the order that torch's generator gives."""
    history, _, _ = run(loop, tmp_path, max_steps=1)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3)).tolist()[:4]
    model, total, count = lora_model().eval(), 0.0, 0
    for i in order:
        batch = data.Collator(tokenizer)([rows()[i]])
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"]).logits[0, :-1]
        targets = batch["labels"][0, 1:]
        total += F.cross_entropy(logits, targets, reduction="sum").item()
        count += int((targets != -100).sum())
    assert history[0]["loss"] == pytest.approx(total / count, rel=1e-5)


@each_loop
def test_a_label_on_the_first_token_of_a_row_does_not_count(loop, tmp_path):
    """Nothing predicts it: `labels` without it give the same run."""
    histories = []
    for first in (-100, 5):
        labelled = Dataset.from_list([row | {"labels": [first, *row["labels"][1:]]} for row in rows()])
        histories.append(LOOPS[loop](lora_model(), arguments(tmp_path, max_steps=1), tokenizer, labelled))
    assert histories[0] == histories[1]


@each_loop
def test_only_the_adapter_moves_and_old_gradients_do_not_count(loop, tmp_path):
    model = lora_model().eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.ones_like(p)
    history = LOOPS[loop](model, arguments(tmp_path, max_steps=2), tokenizer, rows())
    assert model.training
    assert history == run(loop, tmp_path, max_steps=2)[0]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ("lora_" not in name), name
        assert p.grad is None


@each_loop
def test_a_window_without_labels_is_an_error(loop, tmp_path):
    empty = Dataset.from_list([row | {"labels": [-100] * len(row["labels"])} for row in rows()])
    with pytest.raises(ValueError, match="no label token; check that truncation"):
        LOOPS[loop](lora_model(), arguments(tmp_path), tokenizer, empty)


def test_a_loss_that_is_nan_is_returned(tmp_path):
    settings = {"learning_rate": 1e30, "warmup_steps": 0, "max_steps": 3}
    assert any(math.isnan(entry["loss"]) for entry in run("pytorch", tmp_path, **settings)[0])
    assert not any(math.isnan(entry["loss"]) for entry in run("trainer", tmp_path, **settings)[0])


@each_loop
def test_the_bar_counts_updates(loop, tmp_path, capsys):
    LOOPS[loop](lora_model(), arguments(tmp_path, disable_tqdm=False, max_steps=2), tokenizer, rows())
    assert "2/2" in capsys.readouterr().err
    LOOPS[loop](lora_model(), arguments(tmp_path, max_steps=1), tokenizer, rows())
    assert capsys.readouterr() == ("", "")


def test_an_interrupted_accumulate_does_not_stop_accelerate(tmp_path):
    """Accelerators share whether gradients are synchronized; while they are not, a prepared optimizer does not step."""
    settings = arguments(tmp_path, max_steps=1, warmup_steps=0)
    GradientState()._set_sync_gradients(False)
    model = lora_model()
    start = adapter(model)
    training.train_accelerate(model, settings, tokenizer, rows())
    assert not torch.equal(adapter(model), start)


def test_accelerate_leaves_no_autocast_on_the_model(tmp_path):
    model = lora_model()
    batch = data.Collator(tokenizer)([rows()[0]])
    training.train_accelerate(model, arguments(tmp_path, bf16=True, max_steps=1), tokenizer, rows())
    fresh = lora_model()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, fresh.eval()(**batch).logits)


# Mixed precision with a GradScaler. On the CPU accelerate leaves fp16 off, so its switches are set by hand here; the
# computation in fp16, the scaling and the skipped steps are then real.

FIRST_SCALE = 2.0**18  # so large that the first step overflows and is skipped


def _switch_on_fp16(accelerator):
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=FIRST_SCALE)


@pytest.fixture
def fp16_on_the_cpu(monkeypatch):
    class Fp16Accelerator(Accelerator):
        def __init__(self, **options):
            super().__init__(**options)
            _switch_on_fp16(self)

    scaler = functools.partial(torch.amp.GradScaler, init_scale=FIRST_SCALE)
    monkeypatch.setattr(training, "_refuse_what_only_the_trainer_does", lambda arguments: None)
    monkeypatch.setattr(training, "Accelerator", Fp16Accelerator)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    return {"fp16": True, "warmup_steps": 0, "max_steps": 4}


def _skipped(history):
    return [not math.isfinite(entry["grad_norm"]) for entry in history]


def test_a_skipped_fp16_step_does_not_move_the_schedule(fp16_on_the_cpu, tmp_path):
    expected = run("trainer", tmp_path, patch=_switch_on_fp16, **fp16_on_the_cpu)
    skipped = _skipped(expected[0])
    assert skipped[0]
    assert not skipped[-1]
    rates = [entry["learning_rate"] for entry in expected[0]]
    assert [after == before for before, after in pairwise(rates)] == skipped[:-1]
    for loop in LOOPS:
        assert difference(run(loop, tmp_path, **fp16_on_the_cpu), expected) <= TOLERANCE, loop
    full = run("pytorch", tmp_path, **(fp16_on_the_cpu | {"fp16": False}))[0]
    assert full[0]["loss"] != expected[0][0]["loss"]  # fp16 is real
    assert full[0]["loss"] == pytest.approx(expected[0][0]["loss"], rel=0.01)


def test_with_the_fused_optimizer_only_the_plain_loop_sees_a_skipped_step(fp16_on_the_cpu, tmp_path):
    settings = fp16_on_the_cpu | {"optim": "adamw_torch_fused", "max_steps": 2}
    plain, accelerated = (run(loop, tmp_path, **settings)[0] for loop in LOOPS)
    by_trainer = run("trainer", tmp_path, patch=_switch_on_fp16, **settings)[0]
    assert _skipped(plain)[0]
    assert plain[1]["learning_rate"] == plain[0]["learning_rate"]
    assert accelerated[1]["learning_rate"] < accelerated[0]["learning_rate"]
    assert [entry["learning_rate"] for entry in accelerated] == [entry["learning_rate"] for entry in by_trainer]


@pytest.mark.cuda
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("precision", ["fp16", "bf16", None])
def test_the_loops_agree_on_cuda(precision, optim, tmp_path):
    """The kernels may add in another order from run to run, so the tolerance is wider than on the CPU."""
    overrides = {"optim": optim, "use_cpu": False, "fp16": False, "bf16": False}
    if precision:
        overrides[precision] = True
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("needs a GPU with bf16")
    expected = run("trainer", tmp_path, **overrides)
    for loop in LOOPS:
        assert difference(run(loop, tmp_path, **overrides), expected) < (1e-2 if precision else 1e-4), loop
