"""What notebook 05 says about the Trainer: a run resumed after a kill is the run that was not killed, bit by bit."""

import ast
import json
import logging
import math
import os
import re
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

from helpers import data, training
from helpers.finetune.checkpoints import last_complete_checkpoint
from helpers.models import TINY, load_base, load_tokenizer

import nbformat
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "05_trainer.ipynb"

# Imports once, then forks a process for each run. Each process starts at the same state, untouched by any training.
# argv: the folder for the runs. Prints a line of JSON for each scenario.
DRIVER = """
import gc, hashlib, json, os, shutil, signal, sys, traceback, warnings
from pathlib import Path
from helpers import data, hardware, models, training
from helpers.finetune import checkpoints
import peft.peft_model, torch, transformers
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback, set_seed

torch.set_num_threads(1)
tokenizer = models.load_tokenizer("tiny")
rows = data.encode(data.load_commands("train").select(range(5)), tokenizer)  # 3 updates an epoch, the last a tail


def build(folder, callbacks=(), **overrides):
    set_seed(0)
    config = LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(models.load_base("tiny"), config)
    settings = {
        "max_steps": 6, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "logging_steps": 1,
        "save_strategy": "steps", "save_steps": 2,
    }
    arguments = training.training_arguments(folder, **settings | overrides)
    trainer = training.build_trainer(model, arguments, tokenizer, rows, callbacks=list(callbacks))
    trainer.remove_callback(training.LossLines)
    return trainer


def in_a_child(function, *arguments):
    "Run function in a forked process; return the signal that ended it, and the JSON that it returned."
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.close(read)
        try:
            os.write(write, json.dumps(function(*arguments)).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    status = os.waitpid(child, 0)[1]
    return os.WTERMSIG(status), json.loads(answer or "null")


def run(folder, resume=None):
    trainer = build(folder)
    trainer.train(resume_from_checkpoint=resume)
    weights = [p.detach().numpy().tobytes() for _, p in sorted(trainer.model.named_parameters()) if p.requires_grad]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"weights": hashlib.sha256(b"".join(weights)).hexdigest(), "tensors": len(weights), "losses": losses}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class DieAt(TrainerCallback):
    def __init__(self, event, step):
        setattr(self, event, lambda args, state, control, **kwargs: die() if state.global_step == step else None)


def die_in_step(folder, event, step):
    build(folder, [DieAt(event, step)]).train()


def die_in_save(folder, name, share):
    "Die with only a share of one file of checkpoint-4 written."
    def broken(write, position):
        def writer(*arguments, **kwargs):
            path = str(arguments[position])
            if path.endswith(f"checkpoint-4/{name}"):
                if share == 0:
                    die()
                write(*arguments, **kwargs)
                os.truncate(path, int(share * os.path.getsize(path)))
                die()
            return write(*arguments, **kwargs)
        return writer

    torch.save = broken(torch.save, 1)
    peft.peft_model.safe_save_file = broken(peft.peft_model.safe_save_file, 1)
    state = transformers.TrainerState
    state.save_to_json = broken(state.save_to_json, 1)
    build(folder).train()


def die_in_rotation(folder, names):
    "Die while checkpoint-2 is deleted because checkpoint-4 was written."
    def rmtree(path, **kwargs):
        for name in names:
            (Path(path) / name).unlink()
        die()
    shutil.rmtree = rmtree
    build(folder, save_total_limit=1).train()


def resume(folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = checkpoints.last_complete_checkpoint(folder)
    said = [str(warning.message) for warning in caught if "passed over" in str(warning.message)]
    return {"from": found and Path(found).name, "said": said, **run(folder, found)}


folder = Path(sys.argv[1])
build(folder / "warm")  # nothing is trained here; what is compiled once need not be compiled in each process
gc.freeze()  # a collection in a child would copy all of the parent's memory
weights, state = "adapter_model.safetensors", "trainer_state.json"
scenarios = {
    "before the optimizer's step": (die_in_step, "on_pre_optimizer_step", 5),
    "between two micro-batches": (die_in_step, "on_substep_end", 3),
    "before the first checkpoint": (die_in_step, "on_substep_end", 1),
    **{f"half of {name}": (die_in_save, name, 0.5)
       for name in (weights, "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", state)},
    "all but the last bytes of optimizer.pt": (die_in_save, "optimizer.pt", 0.99999),
    "nothing of trainer_state.json": (die_in_save, state, 0),
    "in the rotation": (die_in_rotation, ("optimizer.pt", "README.md")),
}
print(json.dumps({"name": "uninterrupted", **in_a_child(run, folder / "uninterrupted")[1]}), flush=True)
for name, (kill, *arguments) in scenarios.items():
    run_folder = folder / name.replace(" ", "-")
    signal_number, _ = in_a_child(kill, run_folder, *arguments)
    left = sorted(path.name for path in run_folder.iterdir())
    result = in_a_child(resume, run_folder)[1]
    print(json.dumps({"name": name, "signal": signal_number, "left": left, **result}), flush=True)
"""


@pytest.fixture(scope="module", autouse=True)
def _on_the_cpu():
    """A GPU does not promise the same bits twice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_LAB_DEVICE", "cpu")
        yield


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Return what DRIVER printed: a dict for each scenario, by name."""
    if not hasattr(os, "fork"):
        pytest.skip("SIGKILL and fork need a Unix")
    folder = tmp_path_factory.mktemp("killed")
    (folder / "driver.py").write_text(DRIVER, encoding="utf-8")
    command = [sys.executable, str(folder / "driver.py"), str(folder / "runs")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}


KILLED = {
    "before the optimizer's step": ("checkpoint-4", None),
    "between two micro-batches": ("checkpoint-2", None),
    "before the first checkpoint": (None, None),
    "half of adapter_model.safetensors": ("checkpoint-2", "adapter_model.safetensors breaks off"),
    "half of training_args.bin": ("checkpoint-2", "training_args.bin breaks off"),
    "half of optimizer.pt": ("checkpoint-2", "optimizer.pt breaks off"),
    "half of scheduler.pt": ("checkpoint-2", "scheduler.pt breaks off"),
    "half of rng_state.pth": ("checkpoint-2", "rng_state.pth breaks off"),
    "half of trainer_state.json": ("checkpoint-2", "trainer_state.json breaks off"),
    "all but the last bytes of optimizer.pt": ("checkpoint-2", "optimizer.pt breaks off"),
    "nothing of trainer_state.json": ("checkpoint-2", "missing: trainer_state.json"),
    "in the rotation": ("checkpoint-4", None),
}


@pytest.mark.parametrize("name", KILLED)
def test_a_killed_run_resumes_from_the_last_complete_checkpoint_bit_by_bit(killed, name):
    found, said = KILLED[name]
    run, reference = killed[name], killed["uninterrupted"]
    assert run["signal"] == 9
    assert run["from"] == found
    assert [line.split(" is passed over: ")[1] for line in run["said"]] == ([said] if said else [])
    if said:
        assert "checkpoint-4" in run["left"]
        assert "checkpoint-4 is passed over" in run["said"][0]
    assert run["losses"] == reference["losses"]
    assert run["weights"] == reference["weights"]


def test_the_uninterrupted_run_trains(killed):
    assert set(KILLED) | {"uninterrupted"} == set(killed)
    losses = killed["uninterrupted"]["losses"]
    assert len(set(losses)) == len(losses) == 6
    assert all(math.isfinite(loss) for loss in losses)
    assert killed["uninterrupted"]["tensors"] == 56  # A and B of 7 linear layers in 4 blocks


# Resuming, in one process


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """Return a function that builds a Trainer in a new folder or a given one: dropout on, two micro-batches a step."""

    def build(folder=None, lora_alpha=8, add_adapter=False, rows=10, **overrides):
        transformers.set_seed(0)
        config = LoraConfig(
            r=4,
            lora_alpha=lora_alpha,
            lora_dropout=0.1,
            target_modules=["q_proj", "v_proj"],
            task_type="CAUSAL_LM",
        )
        model = load_base("tiny")
        if add_adapter:
            model.add_adapter(config)
        else:
            model = get_peft_model(model, config)
        settings = {
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 4,  # in the middle of the second epoch
        }
        folder = folder or tmp_path_factory.mktemp("run")
        arguments = training.training_arguments(folder, **settings | overrides)
        tokenizer = load_tokenizer("tiny")
        encoded = data.encode(data.load_commands("train").select(range(rows)), tokenizer)
        return training.build_trainer(model, arguments, tokenizer, encoded, encoded)

    return build


@pytest.fixture(scope="module")
def uninterrupted(trainer):
    """Return a finished Trainer; its folder has checkpoint-4 and checkpoint-6."""
    run = trainer()
    run.train()
    return run


def _result(trainer):
    weights = {
        name.removeprefix("base_model.model."): parameter.detach().clone()
        for name, parameter in trainer.model.named_parameters()
        if "lora_" in name
    }
    return weights, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _same(one, other):
    (weights, losses), (other_weights, other_losses) = one, other
    assert weights.keys() == other_weights.keys()
    return losses == other_losses and all(torch.equal(weights[name], other_weights[name]) for name in weights)


@pytest.mark.parametrize("how", ["path", "True"])
def test_resuming_gives_the_uninterrupted_run_bit_by_bit(trainer, uninterrupted, tmp_path, how):
    source = Path(uninterrupted.args.output_dir) / "checkpoint-4"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-4").symlink_to(source, target_is_directory=True)
    resumed = trainer(tmp_path / "run")
    resumed.train(resume_from_checkpoint=True if how == "True" else str(source))
    assert resumed.state.global_step == 6
    assert _same(_result(resumed), _result(uninterrupted))
    assert last_complete_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-6")


@pytest.fixture
def remarks(caplog, recwarn):
    """Return a function that lists what was said so far, by a warning or through the logger of transformers."""
    library, verbosity = logging.getLogger("transformers"), transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    library.addHandler(caplog.handler)  # its records do not propagate to the root
    yield lambda: caplog.messages + [str(warning.message) for warning in recwarn]
    library.removeHandler(caplog.handler)
    transformers.logging.set_verbosity(verbosity)


def test_a_changed_learning_rate_is_ignored_on_resume_and_a_changed_alpha_is_not(trainer, uninterrupted, remarks):
    checkpoint = str(Path(uninterrupted.args.output_dir) / "checkpoint-4")
    transformers.trainer_utils.logger.warning_once.cache_clear()  # or else a remark made before is not made again
    faster = trainer(learning_rate=0.1, save_steps=5)
    faster.train(resume_from_checkpoint=checkpoint)
    assert _same(_result(faster), _result(uninterrupted))

    other_alpha = trainer(lora_alpha=80)
    other_alpha.train(resume_from_checkpoint=checkpoint)
    losses, expected = _result(other_alpha)[1], _result(uninterrupted)[1]
    assert losses[:4] == expected[:4]  # from the checkpoint
    assert losses[4] != expected[4]
    assert any("save_steps" in remark for remark in remarks())  # this one is reported
    assert not [remark for remark in remarks() if "alpha" in remark or re.search(r"learning.rate", remark)]


def test_a_resumed_run_takes_its_place_in_the_schedule_and_the_new_number_of_steps(trainer, uninterrupted):
    checkpoint = str(Path(uninterrupted.args.output_dir) / "checkpoint-4")
    longer = trainer(max_steps=12)
    longer.train(resume_from_checkpoint=checkpoint)
    fresh = trainer(max_steps=12)
    fresh.train()

    def rates(run):
        return [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]

    assert rates(longer)[:5] == rates(uninterrupted)[:5]  # the fifth was computed before the save
    assert rates(longer)[5:] == rates(fresh)[5:]
    assert rates(longer)[5] != rates(uninterrupted)[5]


def test_resuming_without_optimizer_or_random_state_is_silently_another_run(trainer, uninterrupted, tmp_path):
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        broken = tmp_path / name / "checkpoint-4"
        broken.mkdir(parents=True)
        for path in (Path(uninterrupted.args.output_dir) / "checkpoint-4").iterdir():
            if path.name != name:
                (broken / path.name).write_bytes(path.read_bytes())
        resumed = trainer()
        resumed.train(resume_from_checkpoint=str(broken))
        assert resumed.state.global_step == 6
        assert _result(resumed)[1][:4] == _result(uninterrupted)[1][:4]
        assert _result(resumed)[1] != _result(uninterrupted)[1]


def test_add_adapter_cannot_resume_but_get_peft_model_can_resume_its_checkpoint(trainer, uninterrupted):
    run = trainer(add_adapter=True)
    run.train()
    assert _same(_result(run), _result(uninterrupted))
    checkpoint = str(Path(run.args.output_dir) / "checkpoint-4")
    with pytest.raises(ValueError, match="checkpoint index"):
        trainer(add_adapter=True).train(resume_from_checkpoint=checkpoint)
    resumed = trainer()
    resumed.train(resume_from_checkpoint=checkpoint)
    assert _same(_result(resumed), _result(uninterrupted))


# The notebook's table of recipes that no longer run


def _recipes():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code" and cell.source.startswith("RECIPES = ["):
            return ast.literal_eval(cell.source.removeprefix("RECIPES = "))
    raise AssertionError("the notebook has no list RECIPES")


RUNS_BUT_IS_DEPRECATED = {"gradient_checkpointing=True", "torch_dtype=torch.float32"}
CALLS = {
    "TrainingArguments(…)": "TrainingArguments({})",
    "Trainer(…)": "Trainer(model, TrainingArguments(), {})",
    "trainer.train(…)": "trainer.train({})",
    "trainer.…": "trainer.{}",
    "from_pretrained(…)": "transformers.AutoModelForCausalLM.from_pretrained(TINY, {})",
    "from … import AdamW": "from {} import AdamW",
    "from peft import …": "from peft import {}",
}


def test_the_table_has_the_recipes_that_we_know(trainer):
    published = {published for _, published, _ in _recipes()}
    assert len(published) == len(_recipes()) >= 15
    assert published >= RUNS_BUT_IS_DEPRECATED
    for name in ("evaluation_strategy", "warmup_ratio", "no_cuda", "tokenizer", "group_by_length", "load_in_4bit"):
        assert any(line.startswith(name) for line in published), name


@pytest.fixture(scope="module")
def names(trainer, uninterrupted, tmp_path_factory):
    """Return what the lines of the table refer to."""
    arguments = partial(
        transformers.TrainingArguments,
        output_dir=str(tmp_path_factory.mktemp("recipes")),
        use_cpu=True,
        report_to="none",
    )
    return {
        "TrainingArguments": arguments,
        "Trainer": transformers.Trainer,
        "transformers": transformers,
        "torch": torch,
        "TINY": TINY,
        "model": get_peft_model(load_base("tiny"), LoraConfig(task_type="CAUSAL_LM")),
        "tokenizer": load_tokenizer("tiny"),
        "trainer": trainer(),
        "checkpoint": str(Path(uninterrupted.args.output_dir) / "checkpoint-4"),
        "four_bit": transformers.BitsAndBytesConfig(load_in_4bit=True),
    }


@pytest.mark.parametrize(("where", "published", "current"), _recipes(), ids=[line for _, line, _ in _recipes()])
def test_a_published_recipe_ends_as_the_table_says(where, published, current, names):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if published in RUNS_BUT_IS_DEPRECATED:
            exec(CALLS[where].format(published), dict(names))
        else:
            with pytest.raises((AttributeError, ImportError, TypeError, ValueError)) as error:
                exec(CALLS[where].format(published), dict(names))
            # Not some other error: the message names what the recipe asks for.
            assert published.split("=")[0] in str(error.value) or "adamw_hf" in str(error.value)
    if published == "gradient_checkpointing=True":
        assert any("gradient_checkpointing" in str(warning.message) for warning in caught)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(CALLS[where].format(current), dict(names))
    assert not [warning for warning in caught if "deprecated" in str(warning.message)]


def test_the_stored_table_tells_each_error(names):
    """The printed table has, for each published form, the type of error that it raises here."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    printed = "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))
    for where, published, current in _recipes():
        try:
            exec(CALLS[where].format(published), dict(names))
            end = "deprecated"
        except Exception as error:
            end = type(error).__name__
        line = next(line for line in printed.splitlines() if line.strip().startswith(f"{published} "))
        assert line.split()[len(published.split()) :] == [end, *(current or "(leave it out)").split()]
