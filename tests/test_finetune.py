"""helpers.finetune: interrupted in every way and started again, a run ends as if nothing had happened."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

from helpers import data
from helpers.evaluation import completion_loss
from helpers.finetune import distributed
from helpers.finetune import script as finetune
from helpers.finetune.checkpoints import last_complete_checkpoint
from helpers.finetune.folders import atomic_write_text
from helpers.finetune.runs import DECISIVE, LOCK, SETTINGS, UNSHARDED, lock_and_find_checkpoint, record
from helpers.models import load_base, load_tokenizer
from helpers.training import training_arguments

import pytest
import torch
from accelerate.utils import DistributedType
from filelock import FileLock
from peft import PeftModel
from safetensors.torch import load_file
from transformers import HfArgumentParser, TrainerCallback, TrainingArguments
from transformers.integrations import deepspeed

COMMAND = ["--model", "tiny", "--use_cpu", "true", "--max_steps", "6"]


@pytest.fixture(scope="module", autouse=True)
def _on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_LAB_DEVICE", "cpu")
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
            patch.delenv(name, raising=False)
        yield


def _write_rows(path, number=10):
    rows = data.load_commands("train").select(range(number))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the folder of all runs, and for each name what became of its starts, in order."""
    folder = tmp_path_factory.mktemp("finetune")
    _write_rows(folder / "data.jsonl")
    command = [sys.executable, str(Path(__file__).with_name("killed_finetune.py")), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stderr
    starts = {}
    for line in done.stdout.splitlines():
        start = json.loads(line)
        starts.setdefault(start["name"], []).append(start)
    return folder, starts


def _result(run):
    metrics = json.loads((run / "final" / "metrics.json").read_text(encoding="utf-8"))
    losses = [entry["loss"] for entry in metrics["log"] if "loss" in entry]
    assert len(losses) == metrics["updates"] == 6
    return losses, load_file(run / "final" / "adapter_model.safetensors")


def _assert_same(run, other, exact):
    """To the bit, or as close as another order of summation leaves it."""
    (losses, adapter), (other_losses, other_adapter) = _result(run), _result(other)
    assert losses == (other_losses if exact else pytest.approx(other_losses, abs=1e-6))
    # Where a gradient is nearly 0, Adam's division makes more of rounding:
    # 4e-6 in 1 of 512 elements on one machine, below 1e-6 on another.
    torch.testing.assert_close(adapter, other_adapter, atol=0 if exact else 1e-5, rtol=0)


@pytest.mark.slow
def test_a_run_ends_with_adapter_and_metrics(runs):
    folder, starts = runs
    (start,) = starts["one"]
    assert start["codes"] == [finetune.ENDED]
    assert start["left"] == [*(f"checkpoint-{n}" for n in (2, 4, 6)), "final", "finetune.json", "finetune.lock"]
    lines = start["said"].splitlines()
    assert len(lines) == 7, lines
    assert lines[-1] == f"ended after 6 updates; the result is in {folder / 'one' / 'final'}"
    final = {path.name for path in (folder / "one" / "final").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "metrics.json", "tokenizer.json"} <= final
    assert "training_args.bin" not in final
    losses, adapter = _result(folder / "one")
    assert losses[-1] < losses[0]
    model = PeftModel.from_pretrained(load_base("tiny"), folder / "one" / "final")
    trained = {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name}
    assert all(torch.equal(trained[name], value) for name, value in adapter.items())
    assert any(value.any() for name, value in adapter.items() if "lora_B" in name)


KILL, TERM = -9, finetune.STOPPED
INTERRUPTED = [  # the first start's codes, what it left, a line that the second does not repeat, the run that it equals
    ("killed", [KILL], "checkpoint-4", "step 4 of 6", "one"),
    ("term", [TERM], "checkpoint-3", "step 3 of 6", "one"),
    ("before-the-metrics", [KILL], "final.unfinished", "step 6 of 6", "one"),
    ("after-the-metrics", [KILL], "final.unfinished", "step 6 of 6", "one"),
    ("two-term", [TERM, TERM], "checkpoint-3", "step 3 of 6", "two"),  # the signal went to one of them
    ("two-killed", [KILL, KILL], "checkpoint-4", "step 4 of 6", "two"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "codes", "left", "done", "same_as"), INTERRUPTED, ids=[row[0] for row in INTERRUPTED])
def test_interrupted_and_started_again_it_is_the_run_that_was_not(runs, name, codes, left, done, same_as):
    folder, starts = runs
    stopped, again, *once_more = starts[name]
    assert stopped["codes"] == codes
    assert left in stopped["left"]
    assert "final" not in stopped["left"]
    assert (f"SIGTERM: {left} is saved" in stopped["said"]) == (TERM in codes)
    assert again["codes"] == [finetune.ENDED] * len(codes)
    assert done not in again["said"]
    assert ("step 5 of 6" in again["said"]) == left.startswith("checkpoint")
    assert "final.unfinished" not in again["left"]
    _assert_same(folder / name, folder / same_as, exact=len(codes) == 1)
    assert all("has ended already" in start["said"] and start["codes"] == [finetune.ENDED] for start in once_more)
    if name == "two-term":
        random_states = {path.name for path in (folder / name / left).glob("rng*")}
        assert random_states == {"rng_state_0.pth", "rng_state_1.pth"}


@pytest.mark.slow
def test_signals_before_the_first_update_after_the_last_and_at_different_times(runs):
    _, starts = runs
    (early,), (late,), (apart,) = starts["early"], starts["late"], starts["two-apart"]
    assert early["codes"] == [finetune.STOPPED] == [143]
    assert "checkpoint-1" in early["left"]
    assert late["codes"] == [finetune.ENDED]
    assert "final" in late["left"]
    assert apart["codes"] == [143, 143]  # two processes stop at the first of their signals
    assert [name for name in apart["left"] if name.startswith("checkpoint")] == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.slow
def test_two_processes_give_what_one_gives_and_one_can_go_on_for_them(runs):
    folder, starts = runs
    (two,), (one,) = starts["two"], starts["to-one"]
    assert two["codes"] == [finetune.ENDED] * 2
    assert len(two["said"].splitlines()) == 7, two["said"]  # the first process only
    metrics = json.loads((folder / "two" / "final" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["processes"] == 2
    assert one["codes"] == [finetune.ENDED]
    assert "has the random state of 2 processes and this run has 1" in one["said"]
    for name in ("two", "to-one"):
        _assert_same(folder / name, folder / "exact", exact=False)


@pytest.mark.slow
def test_torchrun_passes_the_signal_on(runs, tmp_path):
    """The real launcher with two processes; the signal goes to it, after its first checkpoint."""
    folder, _ = runs
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    command += ["helpers.finetune", "--train", str(folder / "data.jsonl"), "--model", "tiny", "--output_dir"]
    command += [str(tmp_path / "run"), "--max_steps", "5000", "--per_device_train_batch_size", "1", "--save_steps", "5"]
    command += ["--lora_r", "4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    try:
        until = time.monotonic() + 180
        while not (tmp_path / "run" / "checkpoint-5").exists() and time.monotonic() < until:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    (line,) = (line for line in said.splitlines() if line.startswith("SIGTERM: "))
    step = int(line.split()[1].removeprefix("checkpoint-"))
    assert Path(last_complete_checkpoint(tmp_path / "run")).name == f"checkpoint-{step}"
    assert step < 5000
    assert not (tmp_path / "run" / "final").exists()


# What is given wrongly, in this process


def _error(capsys, *arguments, more=()):
    """Return what main prints on stderr; nothing else is printed, and the code is WRONG."""
    before = signal.getsignal(signal.SIGTERM)
    assert finetune.main([*arguments, *COMMAND, *more]) == finetune.WRONG
    assert signal.getsignal(signal.SIGTERM) is before
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, printed.err
    return lines[0]


@pytest.fixture
def rows(tmp_path):
    return _write_rows(tmp_path / "data.jsonl")


def test_a_bad_file_is_named_with_its_row(tmp_path, rows, capsys):
    run = ["--output_dir", str(tmp_path / "run")]
    missing = str(tmp_path / "no.jsonl")
    assert missing in _error(capsys, "--train", missing, *run)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(rows.read_text(encoding="utf-8") + '{"prompt": "only"}\n', encoding="utf-8")
    assert f"{bad}, line 11: 'completion' is missing" in _error(capsys, "--train", str(bad), *run[:1], run[1] + "2")
    long = _error(capsys, "--train", str(rows), *run[:1], run[1] + "3", more=["--max_length", "5"])
    assert f"{rows}, row 1 and 9 more: the prompt alone has" in long
    validation = ["--validation", str(bad)]
    assert f"{bad}, line 11" in _error(capsys, "--train", str(rows), *run[:1], run[1] + "4", more=validation)
    assert not list(tmp_path.glob("run*/final"))


def test_a_wrong_parameter_is_named(tmp_path, rows, capsys):
    def error(number, *more):
        return _error(capsys, "--train", str(rows), "--output_dir", str(tmp_path / str(number)), more=more)

    half = error(1, "--target_modules", "q_proj", "v_prj")
    assert "v_prj" in half
    assert "no-such-module" in error(2, "--target_modules", "no-such-module")
    assert "`r` should be a positive integer" in error(3, "--lora_r", "0")
    assert "--save_only_model" in error(4, "--save_only_model", "true")
    assert "--enable_jit_checkpoint" in error(5, "--enable_jit_checkpoint", "true")
    assert "no/such/model" in error(6, "--model", "no/such/model")
    assert "t most one of fp16 and bf16" in error(7, "--fp16", "true", "--bf16", "true")  # from transformers


@pytest.mark.slow
def test_other_settings_are_refused_before_and_after_the_end(runs, tmp_path, capsys):
    folder, _ = runs
    shutil.copytree(folder / "term", tmp_path / "run")
    train = ["--train", str(folder / "data.jsonl"), "--output_dir", str(tmp_path / "run")]
    same = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--lora_r", "4"]
    same += ["--lora_dropout", "0.1", "--logging_steps", "1", "--save_steps", "2"]
    assert finetune.main([*train, *COMMAND, *same]) == finetune.ENDED
    assert "has ended already" in capsys.readouterr().out
    for state in ("holds the result of a run", "holds a run that began"):
        said = _error(capsys, *train, more=[*same, "--learning_rate", "0.1", "--lora_alpha", "64"])
        assert f"{state} with other settings: lora_alpha was 32 and is 64; learning_rate was 0.001 and is 0.1." in said
        assert "effective batch was 4 and is 2" in _error(capsys, *train, more=[*same[2:], *same[:1], "1"])
        shutil.rmtree(tmp_path / "run" / "final", ignore_errors=True)
    more = _write_rows(tmp_path / "more.jsonl", 11)
    assert "train was" in _error(capsys, "--train", str(more), *train[2:], more=same)
    (tmp_path / "run" / "finetune.json").unlink()
    assert "holds a run that this script did not start" in _error(capsys, *train, more=same)
    assert (tmp_path / "run" / "checkpoint-4").exists()


@pytest.mark.slow
def test_what_does_not_decide_may_change_and_so_may_the_parts_of_the_effective_batch(runs, tmp_path, capsys):
    folder, _ = runs
    shutil.copytree(folder / "term", tmp_path / "run")
    moved = shutil.copy(folder / "data.jsonl", tmp_path / "moved.jsonl")
    same = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4", "--lora_r", "4"]
    same += ["--lora_dropout", "0.1", "--logging_steps", "3", "--save_steps", "5", "--dataloader_num_workers", "1"]
    assert (
        finetune.main(["--train", str(moved), "--output_dir", str(tmp_path / "run"), *COMMAND, *same]) == finetune.ENDED
    )


def test_two_runs_in_one_folder_are_refused(tmp_path, rows, capsys):
    """What two processes do that a launcher did not bring together, whatever the launcher."""
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / LOCK):
        said = _error(capsys, "--train", str(rows), "--output_dir", str(tmp_path / "run"))
    assert "another run is writing there" in said
    assert not (tmp_path / "run" / "finetune.json").exists()


def test_lonely_processes_are_refused(tmp_path, rows, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = ["--train", str(rows), "--output_dir", str(tmp_path / "run")]
    # Without LOCAL_RANK, Accelerate takes this process for the only one.
    said = _error(capsys, *arguments, more=["--use_cpu", "false"])
    assert "the launcher started 2 processes" in said
    assert "--use_cpu true" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "world_size", "said"),
    [
        ({}, 1, None),
        ({"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "x"}, 1, None),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "x"}, 2, None),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "x"}, 1, "the launcher started 2 processes"),
        ({"MASTER_ADDR": "x"}, 1, None),  # a cluster may set it for all
        ({"ACCELERATE_MIXED_PRECISION": "no"}, 1, None),  # `accelerate launch` with one process
        ({"MASTER_ADDR": "x", "ACCELERATE_MIXED_PRECISION": "no"}, 1, "`accelerate launch` was asked for several"),
        ({"MASTER_ADDR": "x", "ACCELERATE_MIXED_PRECISION": "no", "WORLD_SIZE": "8", "RANK": "3"}, 8, None),
    ],
)
def test_who_counts_as_lonely(environment, world_size, said):
    if said is None:
        distributed.check_world_size(world_size, environment)
    else:
        with pytest.raises(ValueError, match=said):
            distributed.check_world_size(world_size, environment)


def test_fsdp_that_is_ddp_is_refused(monkeypatch):
    def trainer(fsdp, used):
        return SimpleNamespace(args=SimpleNamespace(fsdp=fsdp), accelerator=SimpleNamespace(distributed_type=used))

    distributed.check_sharding(trainer(None, DistributedType.MULTI_CPU))
    distributed.check_sharding(trainer(True, DistributedType.FSDP))
    with pytest.raises(ValueError, match="FSDP was asked for, and the Trainer would use MULTI_CPU"):
        distributed.check_sharding(trainer(True, DistributedType.MULTI_CPU))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="would use NO"):
        distributed.check_sharding(trainer(None, DistributedType.NO))


def test_a_result_without_an_adapter_is_not_called_final(tmp_path):
    """FSDP with SHARDED_STATE_DICT: the Trainer's save_model writes nothing."""
    trainer = SimpleNamespace(
        args=SimpleNamespace(output_dir=str(tmp_path), process_index=0),
        state=SimpleNamespace(log_history=[], global_step=3),
        eval_dataset=None,
        accelerator=SimpleNamespace(wait_for_everyone=lambda: None),
        save_model=lambda folder: None,
    )
    with pytest.raises(OSError, match="saved no adapter; with FSDP, set fsdp_state_dict_type"):
        finetune._write_final(trainer, finetune.FinetuneArguments(train=""))
    assert not list(tmp_path.iterdir())


def test_the_defaults_are_those_of_the_notebooks():
    """defaults() repeats what training_arguments sets."""
    plain, ours = TrainingArguments("x", report_to="none").to_dict(), training_arguments("x").to_dict()
    changed = {name for name in ours if ours[name] != plain[name]} - {"per_device_train_batch_size"}
    given = finetune.defaults()
    named = TrainingArguments("x", **given).to_dict()
    assert changed - {"save_strategy", "per_device_eval_batch_size", "logging_dir"} <= given.keys()
    for name in changed - {"save_strategy", "per_device_eval_batch_size"}:
        assert named[name] == ours[name], name


def test_sharded_four_bit_weights_are_stored_in_the_dtype_of_the_others():
    """Accelerate leaves uint8 whole, and FSDP2 casts other dtypes than its own: see the table in notebook 11."""
    settings = finetune.FinetuneArguments(train="", model="tiny", load_in_4bit=True)
    arguments = TrainingArguments(output_dir="unused", use_cpu=True, bf16=True)
    models = {sharded: finetune.build_model(settings, arguments, sharded) for sharded in (False, True)}
    dtypes = {
        sharded: {p.dtype for name, p in model.named_parameters() if "lora_" not in name}
        for sharded, model in models.items()
    }
    assert dtypes == {False: {torch.uint8, torch.float32}, True: {torch.bfloat16}}
    for model in models.values():
        assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
        assert {p.requires_grad for name, p in model.named_parameters() if "lora_" not in name} == {False}


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        finetune.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for action in HfArgumentParser((finetune.FinetuneArguments, TrainingArguments))._actions:
        assert action.help, action.option_strings
        assert action.option_strings[0] in text


def test_csv_and_chat_messages_are_read_as_well(tmp_path, rows):
    tokenizer = load_tokenizer("tiny")

    def read_rows(path):
        return finetune._rows(finetune.FinetuneArguments(train=str(path)), tokenizer)[0]

    read = read_rows(rows)
    data.load_commands("train").select(range(10)).select_columns(["prompt", "completion"]).to_csv(tmp_path / "d.csv")
    assert read_rows(tmp_path / "d.csv")[:] == read[:]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    pairs = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    roles = (("user", "prompt"), ("assistant", "completion"))
    turns = [[{"role": role, "content": pair[key]} for role, key in roles] for pair in pairs]
    chat = tmp_path / "chat.jsonl"
    chat.write_text("".join(json.dumps({"messages": two}) + "\n" for two in turns), encoding="utf-8")
    assert read_rows(chat)[:] == read[:]


def test_a_run_that_diverges_has_another_exit_code_and_no_result(tmp_path, rows, capsys):
    run = ["--train", str(rows), "--output_dir", str(tmp_path / "run"), "--learning_rate", "5e3"]
    assert finetune.main([*COMMAND, *run]) == finetune.DIVERGED
    said = capsys.readouterr()
    assert re.search(r"^error: update [23], micro-batch 1 .* There is no result\.$", said.err, re.M)
    assert "ended" not in said.out
    assert not (tmp_path / "run" / "final").exists()
    assert not (tmp_path / "run" / "final.unfinished").exists()


def test_a_result_that_is_not_finite_is_not_called_final(tmp_path, rows, monkeypatch):
    """Where nothing watches the run: under FSDP and DeepSpeed."""
    monkeypatch.setattr(finetune, "DiagnosticsCallback", TrainerCallback)
    run = ["--train", str(rows), "--output_dir", str(tmp_path / "run"), "--learning_rate", "5e3"]
    assert finetune.main([*COMMAND, *run]) == finetune.DIVERGED
    assert not list((tmp_path / "run").glob("final*"))


def test_qlora_s_recipe_trains_and_its_card_says_what_was_measured(tmp_path, rows):
    """In 4 bits and with checkpointing; the loss is that of `completion_loss`, whatever the batches are."""
    held_out, run = tmp_path / "held_out.jsonl", tmp_path / "run"
    test = data.load_commands("test").select(range(7))
    held_out.write_text("".join(json.dumps(row) + "\n" for row in test), encoding="utf-8")
    recipe = ["--load_in_4bit", "true", "--gradient_checkpointing", "true", "--per_device_eval_batch_size", "2"]
    given = ["--train", str(rows), "--validation", str(held_out), "--output_dir", str(run)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert finetune.main([*COMMAND, *given, *recipe]) == finetune.ENDED
    assert not [str(warning.message) for warning in said if "diagnos" in str(warning.message)]
    metrics = json.loads((run / "final" / "metrics.json").read_text(encoding="utf-8"))
    model = PeftModel.from_pretrained(load_base("tiny", quantization="nf4"), run / "final")
    loss = completion_loss(model, load_tokenizer("tiny"), test)
    assert metrics["eval_loss_per_label_token"] == pytest.approx(loss, abs=1e-5)
    assert "eval_loss" not in metrics
    config = json.loads((run / "final" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "tiny"
    card = (run / "final" / "README.md").read_text(encoding="utf-8")
    assert f"A loss of {loss:.4f} nats per label token on 7 validation rows" in card
    assert f"SHA-256 `{hashlib.sha256(rows.read_bytes()).hexdigest()[:16]}…`" in card
    assert "More Information Needed" not in card
    assert str(tmp_path) not in card
    assert "/" not in config["base_model_name_or_path"]


def test_what_the_script_says_before_it_trains(tmp_path, rows):
    """Rows in both files, rows that are cut, and an EOS that the base does not stop at."""
    base = load_base("tiny", device="cpu")
    base.config.eos_token_id = base.generation_config.eos_token_id = 2
    base.save_pretrained(tmp_path / "base")
    load_tokenizer("tiny").save_pretrained(tmp_path / "base")
    command = ["--train", str(rows), "--validation", str(rows)]
    command += ["--model", str(tmp_path / "base"), "--max_steps", "1", "--use_cpu", "true"]

    def messages(*more):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert finetune.main([*command, *more]) == finetune.ENDED
        return "\n".join(str(warning.message) for warning in caught)

    # The Trainer sets the model's EOS to the tokenizer's, so it must be said before.
    assert "eos-of-two-minds: the labels end with token 0" in messages("--output_dir", str(tmp_path / "whole"))
    said = messages("--output_dir", str(tmp_path / "run"), "--max_length", "40")
    assert f"{rows}: the prompts of 10 of 10 rows (1, 2, 3, 4, 5…) are in {rows} too" in said
    assert re.search(rf"{re.escape(str(rows))}: \d of 10 rows have more than 40 tokens and lost their end", said)
    assert json.loads((tmp_path / "run/final/adapter_config.json").read_text())["base_model_name_or_path"] == "base"


def test_four_bits_are_refused_with_zero_3(tmp_path, rows, capsys, monkeypatch):
    """transformers refuses it too, in words about a device_map that nobody gave."""
    engine = SimpleNamespace(is_zero3=lambda: True)
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", lambda: engine)
    with pytest.raises(ValueError, match="device_map"):
        load_base("tiny", quantization="nf4")
    run = ["--train", str(rows), "--output_dir", str(tmp_path / "run"), "--load_in_4bit"]
    assert "--load_in_4bit does not go with DeepSpeed ZeRO-3; take FSDP" in _error(capsys, *run)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "environment", "engine"),
    [
        ({}, {}, UNSHARDED),
        ({}, {"ACCELERATE_USE_FSDP": "false"}, UNSHARDED),
        ({"fsdp": True}, {}, "FSDP"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "FSDP"),
        ({"deepspeed": "config.json"}, {}, "DeepSpeed"),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
    ],
)
def test_the_engine_is_recognised(given, environment, engine, monkeypatch):
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert finetune._engine(SimpleNamespace(**{"fsdp": None, "deepspeed": None, **given})) == engine


def test_another_engine_is_refused(tmp_path):
    arguments = TrainingArguments(tmp_path / "run", use_cpu=True)
    began, other = (record({"train": "x"}, arguments, engine) for engine in ("FSDP", "DeepSpeed"))
    for _ in range(2):  # at the start, and when it is started again
        with ExitStack() as held:
            assert lock_and_find_checkpoint(began, arguments, held) == (None, False)
    with ExitStack() as held, pytest.raises(ValueError, match="engine was FSDP and is DeepSpeed"):
        lock_and_find_checkpoint(other, arguments, held)


@pytest.mark.parametrize(
    "changed", [{"accelerator_config": {"split_batches": True}}, {"ignore_data_skip": True}, {"learning_rate": 0.5}]
)
def test_what_decides_is_recorded(changed, tmp_path):
    arguments = [TrainingArguments(tmp_path, use_cpu=True, **more) for more in ({}, changed)]
    records = [record({"train": "x"}, each, "") for each in arguments]
    assert {key for key in records[0] if records[0][key] != records[1][key]} == changed.keys()
    assert set(DECISIVE) <= records[0].keys()


def test_an_incomplete_checkpoint_is_passed_over_where_it_can_be_known(tmp_path):
    """Under FSDP and DeepSpeed the last one is taken, complete or not, as the script's help says."""
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    arguments = TrainingArguments(tmp_path / "run", use_cpu=True)
    for engine, found in (("FSDP", str(tmp_path / "run" / "checkpoint-3")), (UNSHARDED, None)):
        now = record({"train": "x"}, arguments, engine)
        atomic_write_text(tmp_path / "run" / SETTINGS, json.dumps(now))
        with ExitStack() as held, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert lock_and_find_checkpoint(now, arguments, held) == (found, False)
