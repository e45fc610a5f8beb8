"""Which checkpoints count as complete: real ones of the Trainer, whole and damaged in every way that we know."""

import json
import os
import shutil
import warnings
import zipfile
from pathlib import Path

from helpers.finetune.checkpoints import IN_PROGRESS, checkpoint_fault, last_complete_checkpoint

import pytest
import shared
import torch
from safetensors.torch import save_file
from transformers import trainer_jit_checkpoint
from transformers.trainer_utils import get_last_checkpoint

FILES = [
    "adapter_model.safetensors",
    "adapter_config.json",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
]


def _train(folder, model=None, **settings):
    shared.trainer(folder, model, **settings).train()
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a folder with checkpoint-1 and checkpoint-2, which nothing may change."""
    return _train(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def run(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def _found(folder):
    """What last_complete_checkpoint returns, as a name, and the warnings it gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = last_complete_checkpoint(folder)
    return found and Path(found).name, [str(warning.message) for warning in caught]


def test_it_is_what_transformers_takes_where_all_are_complete(run):
    assert last_complete_checkpoint(run) == get_last_checkpoint(str(run)) == str(run / "checkpoint-2")
    assert _found(run) == ("checkpoint-2", [])
    assert [checkpoint_fault(run / f"checkpoint-{n}") for n in (1, 2)] == [None, None]
    assert checkpoint_fault(str(run / "checkpoint-2")) is None


@pytest.mark.parametrize("damage", ["missing", "empty", "half", "last byte", "zeros"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(run, damage):
    for name in FILES:
        file = run / "checkpoint-2" / name
        whole = file.read_bytes()
        # JSON ends with a line break, without which it is whole. Zeros: as after a power cut.
        last = len(whole) - (2 if name.endswith(".json") else 1)
        parts = {"empty": b"", "half": whole[: len(whole) // 2], "last byte": whole[:last], "zeros": bytes(len(whole))}
        file.unlink()
        if damage in parts:
            file.write_bytes(parts[damage])
        fault = checkpoint_fault(run / "checkpoint-2")
        assert fault == (f"{name} breaks off" if damage in parts else f"missing: {name}")
        assert _found(run) == ("checkpoint-1", [f"{run / 'checkpoint-2'} is passed over: {fault}"])
        assert get_last_checkpoint(str(run)).endswith("checkpoint-2")
        file.write_bytes(whole)


def test_files_that_nothing_is_resumed_from_do_not_matter(run):
    (run / "checkpoint-2" / "README.md").unlink()
    (run / "checkpoint-2" / "notes.txt").write_text("half a sen", encoding="utf-8")
    assert _found(run) == ("checkpoint-2", [])


def test_the_highest_number_is_the_newest(run):
    """By number, not as text, and not by the time of the file."""
    for step in (9, 10):
        copy = shutil.copytree(run / "checkpoint-2", run / f"checkpoint-{step}")
        state = json.loads((copy / "trainer_state.json").read_text(encoding="utf-8"))
        (copy / "trainer_state.json").write_text(json.dumps(state | {"global_step": step}), encoding="utf-8")
    os.utime(run / "checkpoint-9")
    assert _found(run) == ("checkpoint-10", [])


def test_a_folder_with_the_state_of_another_step_is_passed_over(run):
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-7")
    found, said = _found(run)
    assert found == "checkpoint-2"
    assert said == [f"{run / 'checkpoint-7'} is passed over: trainer_state.json is of step 2"]


def test_each_broken_folder_is_named_and_nothing_is_deleted(run):
    (run / "checkpoint-8").mkdir()
    (run / "checkpoint-2" / "optimizer.pt").unlink()
    (run / "checkpoint-1" / "optimizer.pt").unlink()
    before = sorted(run.rglob("*"))
    found, said = _found(run)
    assert found is None
    assert [line.split(" is ")[0] for line in said] == [str(run / f"checkpoint-{n}") for n in (8, 2, 1)]
    files = "training_args.bin, optimizer.pt, scheduler.pt, rng_state.pth, trainer_state.json"
    assert said[0].endswith(f"missing: {files}, the weights")
    assert sorted(run.rglob("*")) == before


def test_other_folders_and_files_are_not_looked_at(run):
    for name in ("runs", "checkpoint-best", "old-checkpoint-9", "checkpoint-9-old"):
        shutil.copytree(run / "checkpoint-1", run / name)
    (run / "checkpoint-12").write_text("a file", encoding="utf-8")
    assert _found(run) == ("checkpoint-2", [])


def test_no_checkpoint_is_none_and_a_file_is_refused(tmp_path):
    assert _found(tmp_path) == (None, [])
    assert _found(tmp_path / "not yet") == (None, [])
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(NotADirectoryError):
        last_complete_checkpoint(tmp_path / "file")


def test_a_save_in_progress_is_passed_over(run):
    """transformers' JITCheckpointCallback leaves this mark in a folder until the save has ended."""
    assert IN_PROGRESS in Path(trainer_jit_checkpoint.__file__).read_text(encoding="utf-8")
    (run / "checkpoint-2" / IN_PROGRESS).write_text("", encoding="utf-8")
    found, (said,) = _found(run)
    assert found == "checkpoint-1"
    assert IN_PROGRESS in said


def test_weights_alone_are_no_checkpoint_to_resume_from(tmp_path):
    folder = _train(tmp_path, save_only_model=True)
    found, said = _found(folder)
    assert found is None
    assert all("missing: optimizer.pt, scheduler.pt, rng_state.pth" in line for line in said)
    assert len(said) == 2


def test_rotation_leaves_complete_checkpoints(tmp_path):
    folder = _train(tmp_path, max_steps=4, save_total_limit=1)
    assert [path.name for path in folder.iterdir()] == ["checkpoint-4"]
    assert _found(folder) == ("checkpoint-4", [])


def test_further_adapters_are_looked_at_too(tmp_path):
    model = shared.adapter()
    model.add_adapter("second", model.peft_config["default"])
    folder = _train(tmp_path, model)
    second = folder / "checkpoint-2" / "second"
    assert _found(folder) == ("checkpoint-2", [])
    os.truncate(second / "adapter_model.safetensors", 100)
    assert checkpoint_fault(folder / "checkpoint-2") == "second/adapter_model.safetensors breaks off"
    (second / "adapter_model.safetensors").unlink()
    assert checkpoint_fault(folder / "checkpoint-2") == "missing: second/adapter_model.safetensors"


def test_a_full_model_counts_with_all_of_its_shards(tmp_path):
    """As full fine-tuning saves it; the second checkpoint is split in two by hand, as large models are."""
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 768}
    folder = _train(tmp_path, shared.llama(**small))
    assert _found(folder) == ("checkpoint-2", [])
    newest = folder / "checkpoint-2"
    (newest / "model.safetensors").unlink()
    assert checkpoint_fault(newest) == "missing: the weights"
    assert not (newest / "adapter_config.json").exists()
    shared.llama(**small).save_pretrained(newest, max_shard_size="20KB")
    shards = sorted(path.name for path in newest.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert checkpoint_fault(newest) is None
    (newest / shards[-1]).unlink()
    assert checkpoint_fault(newest) == f"missing: {shards[-1]}"


def test_an_adapter_without_tensors_is_no_checkpoint(run):
    """peft#2892: a 40-byte file with a whole header, from which the run would go on as from the beginning."""
    save_file({}, run / "checkpoint-2" / "adapter_model.safetensors", metadata={"format": "pt"})
    fault = "adapter_model.safetensors has no tensor in it"
    assert _found(run) == ("checkpoint-1", [f"{run / 'checkpoint-2'} is passed over: {fault}"])


@pytest.mark.parametrize(("fp16", "cuda"), [(True, True), (True, False), (False, True)])
def test_the_loss_scale_of_fp16_on_a_gpu_must_be_there(tmp_path, fp16, cuda):
    folder = _train(tmp_path, fp16=fp16, max_steps=1) / "checkpoint-1"
    state = torch.load(folder / "rng_state.pth", weights_only=False)
    assert "cuda" not in state
    torch.save(state | ({"cuda": [torch.zeros(16, dtype=torch.uint8)]} if cuda else {}), folder / "rng_state.pth")
    assert checkpoint_fault(folder) == ("missing: scaler.pt" if fp16 and cuda else None)
    torch.save({"scale": 1.0}, folder / "scaler.pt")
    assert checkpoint_fault(folder) is None


def test_nothing_is_unpickled(run):
    """A pickle that would run code is read as an archive only."""

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(run / "sprung"),)

    for name in ("training_args.bin", "rng_state.pth", "optimizer.pt"):
        torch.save(Trap(), run / "checkpoint-2" / name)
    assert zipfile.is_zipfile(run / "checkpoint-2" / "optimizer.pt")
    assert _found(run) == ("checkpoint-2", [])
    assert not (run / "sprung").exists()
