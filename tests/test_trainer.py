"""What notebook 05 says about the Trainer: a run resumed after a kill is the run that was not killed, bit by bit."""

import ast
import inspect
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

from helpers.finetune.checkpoints import last_complete_checkpoint
from helpers.models import TINY, load_base, load_tokenizer

import nbformat
import pytest
import shared
import torch
import transformers
from peft import LoraConfig

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "05_trainer.ipynb"


@pytest.fixture(scope="module", autouse=True)
def _on_the_cpu():
    """A GPU does not promise the same bits twice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_LAB_DEVICE", "cpu")
        yield


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Return what killed_trainer.py printed: a dict for each scenario, by name."""
    if not hasattr(os, "fork"):
        pytest.skip("SIGKILL and fork need a Unix")
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, str(Path(__file__).with_name("killed_trainer.py")), str(folder)]
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


@pytest.mark.slow
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


@pytest.mark.slow
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

    def build(folder=None, lora_alpha=8, add_adapter=False, **overrides):
        options = {"lora_alpha": lora_alpha, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}
        if add_adapter:
            transformers.set_seed(0)
            model = load_base("tiny")
            model.add_adapter(LoraConfig(r=4, task_type="CAUSAL_LM", **options))
        else:
            model = shared.adapter(**options)
        settings = {"max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        settings |= {"logging_steps": 1, "save_steps": 4}  # in the middle of the second epoch
        folder = folder or tmp_path_factory.mktemp("run")
        return shared.trainer(folder, model, rows=10, held_out=shared.encoded(10), **settings | overrides)

    return build


@pytest.fixture(scope="module")
def uninterrupted(trainer):
    """Return a finished Trainer; its folder has checkpoint-4 and checkpoint-6."""
    run = trainer()
    run.train()
    return run


@pytest.mark.parametrize("how", ["path", "True"])
def test_resuming_gives_the_uninterrupted_run_bit_by_bit(trainer, uninterrupted, tmp_path, how):
    source = Path(uninterrupted.args.output_dir) / "checkpoint-4"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-4").symlink_to(source, target_is_directory=True)
    resumed = trainer(tmp_path / "run")
    resumed.train(resume_from_checkpoint=True if how == "True" else str(source))
    assert resumed.state.global_step == 6
    assert shared.same(shared.result(resumed), shared.result(uninterrupted))
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


@pytest.mark.slow
def test_a_changed_learning_rate_is_ignored_on_resume_and_a_changed_alpha_is_not(trainer, uninterrupted, remarks):
    checkpoint = str(Path(uninterrupted.args.output_dir) / "checkpoint-4")
    transformers.trainer_utils.logger.warning_once.cache_clear()  # or else a remark made before is not made again
    faster = trainer(learning_rate=0.1, save_steps=5)
    faster.train(resume_from_checkpoint=checkpoint)
    assert shared.same(shared.result(faster), shared.result(uninterrupted))

    other_alpha = trainer(lora_alpha=80)
    other_alpha.train(resume_from_checkpoint=checkpoint)
    losses, expected = shared.result(other_alpha)[1], shared.result(uninterrupted)[1]
    assert losses[:4] == expected[:4]  # from the checkpoint
    assert losses[4] != expected[4]
    assert any("save_steps" in remark for remark in remarks())  # this one is reported
    assert not [remark for remark in remarks() if "alpha" in remark or re.search(r"learning.rate", remark)]


@pytest.mark.slow
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


@pytest.mark.slow
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
        assert shared.result(resumed)[1][:4] == shared.result(uninterrupted)[1][:4]
        assert shared.result(resumed)[1] != shared.result(uninterrupted)[1]


@pytest.mark.slow
def test_add_adapter_cannot_resume_but_get_peft_model_can_resume_its_checkpoint(trainer, uninterrupted):
    run = trainer(add_adapter=True)
    run.train()
    assert shared.same(shared.result(run), shared.result(uninterrupted))
    checkpoint = str(Path(run.args.output_dir) / "checkpoint-4")
    with pytest.raises(ValueError, match="checkpoint index"):
        trainer(add_adapter=True).train(resume_from_checkpoint=checkpoint)
    resumed = trainer()
    resumed.train(resume_from_checkpoint=checkpoint)
    assert shared.same(shared.result(resumed), shared.result(uninterrupted))


# The notebook's table of recipes that no longer run


def _recipes():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code" and cell.source.startswith("RECIPES = ["):
            return ast.literal_eval(cell.source.removeprefix("RECIPES = "))
    raise AssertionError("the notebook has no list RECIPES")


CALLS = {
    "TrainingArguments(…)": "TrainingArguments({})",
    "Trainer(…)": "Trainer(model, TrainingArguments(), {})",
    "trainer.train(…)": "trainer.train({})",
    "trainer.…": "trainer.{}",
    "from_pretrained(…)": "transformers.AutoModelForCausalLM.from_pretrained(TINY, {})",
    "from … import AdamW": "from {} import AdamW",
    "from peft import …": "from peft import {}",
}


def test_a_published_recipe_fails_for_the_reason_that_the_table_means(tmp_path):
    """The notebook's own run compares each line's end, and that each form on the right runs without a remark."""
    if "warmup_ratio" in inspect.signature(transformers.TrainingArguments).parameters:
        pytest.skip("this version of Transformers still takes warmup_ratio")
    arguments = partial(transformers.TrainingArguments, output_dir=str(tmp_path), use_cpu=True, report_to="none")
    names = {"TrainingArguments": arguments, "Trainer": transformers.Trainer, "transformers": transformers}
    names |= {"torch": torch, "TINY": TINY, "tokenizer": load_tokenizer("tiny"), "checkpoint": "no-such-checkpoint"}
    names |= {"model": shared.adapter(), "trainer": shared.trainer(tmp_path)}
    failed = {}
    for where, published, _ in _recipes():
        try:
            with warnings.catch_warnings(action="ignore"):
                exec(CALLS[where].format(published), dict(names))
        except (AttributeError, ImportError, TypeError, ValueError) as error:
            failed[published] = str(error)
    # Not some other error: the message names what the recipe asks for.
    assert all(line.split("=")[0] in said or "adamw_hf" in said for line, said in failed.items())
    deprecated = {"gradient_checkpointing=True", "torch_dtype=torch.float32"}
    assert {published for _, published, _ in _recipes()} - failed.keys() == deprecated
    for name in ("evaluation_strategy", "warmup_ratio", "no_cuda", "tokenizer", "group_by_length", "load_in_4bit"):
        assert any(line.startswith(name) for line in failed), name
