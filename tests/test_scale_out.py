"""What notebook 11 and the accelerate configs say, held against the libraries that they are about."""

import os
import re
from pathlib import Path

import helpers

import nbformat
import pytest
import torch
import yaml
from accelerate import DataLoaderConfiguration
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from exercises import exercise_functions
from torch.distributed.fsdp import StateDictType
from torch.utils.data import BatchSampler

CONFIGS = Path(helpers.__file__).parent / "assets" / "accelerate"
NAMES = ("ddp", "fsdp2", "zero2", "zero3")
NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "11_scale_out.ipynb"
MORE = "--num_machines 8 --num_processes 64 --machine_rank 3 --main_process_ip 10.0.0.1 --main_process_port 29500"


def _launch(name, *more):
    """Return what `accelerate launch` makes of a file: its arguments and the environment of the processes."""
    config = str(CONFIGS / f"{name}.yaml")
    arguments = launch_command_parser().parse_args(["--config_file", config, *more, "-m", "helpers.finetune"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    if name.startswith("zero"):
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, environment = prepare_deepspeed_cmd_env(arguments)
    else:
        environment = prepare_multi_gpu_env(arguments)
    return arguments, {key: value for key, value in environment.items() if os.environ.get(key) != value}


def test_there_are_these_configs_and_no_other():
    assert sorted(path.name for path in CONFIGS.iterdir()) == [f"{name}.yaml" for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_reads_the_file_and_knows_each_key(name):
    path = CONFIGS / f"{name}.yaml"
    config = load_config_from_file(str(path))  # raises on a key that it does not know
    engine = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(name, "DEEPSPEED")
    assert (config.distributed_type.value, config.num_processes, config.num_machines) == (engine, 8, 1)
    assert (config.mixed_precision, config.use_cpu) == ("bf16", False)
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    flags = {action.dest for action in launch_command_parser()._actions}
    for section in ("fsdp_config", "deepspeed_config"):  # the library takes any key there, and ignores misspelled ones
        assert set(written.get(section, {})) <= flags


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_launch_starts_eight_processes(name):
    arguments, environment = _launch(name)
    assert arguments.nproc_per_node == "8"
    assert (arguments.module, arguments.training_script) == (True, "helpers.finetune")
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert (environment.get("ACCELERATE_USE_FSDP") == "true") == (name == "fsdp2")
    assert (environment.get("ACCELERATE_USE_DEEPSPEED") == "true") == name.startswith("zero")


@pytest.mark.parametrize("name", NAMES)
def test_the_flags_in_the_comments_make_eight_machines_of_eight(name):
    comment = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").replace("\n#", "")
    given = MORE.replace("machine_rank 3", "machine_rank 0..7").replace("10.0.0.1", "ADDRESS-OF-0")
    assert given in " ".join(comment.split())
    arguments, _ = _launch(name, *MORE.split())
    assert (arguments.nproc_per_node, arguments.nnodes, arguments.node_rank) == ("8", "8", 3)
    assert (arguments.rdzv_backend, arguments.rdzv_endpoint) == ("static", "10.0.0.1:29500")


def test_the_fsdp_plugin_that_the_processes_build():
    _, environment = _launch("fsdp2")
    with patch_environment(**environment):
        plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT  # with another, Trainer.save_model writes nothing
    assert plugin.auto_wrap_policy is not None
    plugin.set_mixed_precision(environment["ACCELERATE_MIXED_PRECISION"])  # as AcceleratorState does
    assert plugin.mixed_precision_policy.param_dtype == torch.bfloat16  # what 4-bit weights must be stored in


@pytest.mark.parametrize(("name", "stage"), [("zero2", 2), ("zero3", 3)])
def test_the_deepspeed_plugin_that_the_processes_build(name, stage):
    """It can be built without deepspeed; no engine runs here."""
    _, environment = _launch(name)
    with patch_environment(**environment):
        config = DeepSpeedPlugin().hf_ds_config.config
    assert config["zero_optimization"]["stage"] == stage
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] == (stage == 3)
    assert config["gradient_accumulation_steps"] == config["gradient_clipping"] == "auto"
    assert config["zero_optimization"]["offload_param"]["device"] == "none"
    assert ("ACCELERATE_DEEPSPEED_ZERO3_INIT" in environment) == (stage == 3)


# The solutions of the exercises, against the libraries

SOLUTIONS = exercise_functions("11_scale_out")[1]


CASES = [(100, 4, 2, 3), (64, 4, 2, 4), (41, 2, 4, 4), (17, 1, 2, 2), (50, 3, 2, 2), (9, 4, 1, 2)]


@pytest.mark.parametrize("case", CASES)
def test_the_dealing_of_rows_is_accelerates(case):
    """Exercise 1, against the sampler that the Trainer's data loader uses."""
    rows, micro_batch, steps, processes = case
    batches = BatchSampler(range(rows), micro_batch, drop_last=False)
    assert DataLoaderConfiguration().even_batches
    dealt = [list(BatchSamplerShard(batches, processes, rank, even_batches=True)) for rank in range(processes)]
    counts = {len(batches) for batches in dealt}
    assert len(counts) == 1
    assert {len(batch) for batches in dealt for batch in batches} == {micro_batch}
    used = sum(len(batch) for batches in dealt for batch in batches)
    assert SOLUTIONS["updates_in_an_epoch"](*case) == (-(-counts.pop() // steps), used - rows)


def test_the_factors_mend_an_average_of_means():
    torch.manual_seed(0)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    tokens = [torch.randn(n, 5, dtype=torch.float64) for n in (30, 7, 1)]
    (right,) = torch.autograd.grad((torch.cat(tokens) @ weight).pow(2).mean(), weight)
    factors = SOLUTIONS["loss_factors"]([len(t) for t in tokens])
    scaled = [f * (t @ weight).pow(2).mean() for f, t in zip(factors, tokens, strict=True)]
    averaged = sum(torch.autograd.grad(loss, weight)[0] for loss in scaled) / 3
    torch.testing.assert_close(averaged, right)


# What the notebook prints, where it rests on other things than the run itself


def _printed(start):
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        for output in cell.get("outputs", []):
            if start in output.get("text", ""):
                return output["text"]
    raise AssertionError(start)


def test_the_notebooks_claims_hold_in_its_outputs():
    """nbval compares the numbers; these words must be among them, or the text around them is wrong."""
    assert _printed("in a loss").count("below 1e-05") == 2
    assert "losses of both ranks equal: True" in _printed("in a loss")
    assert "parameters that are split: 94 of 94" in _printed("parameters that are split")
    assert "parameters that are split: 0 of 94" in _printed("Trainer with fsdp=True")
    assert "processes that were started: 1" in _printed("processes that were started")
    assert "told it is one of several: False" in _printed("told it is one of several")
    rows = re.findall(r"(\w+) 4096, here 2048 +(\w+) +(.+)", _printed("stored as"))
    results = {(storage, policy): result for storage, policy, result in rows}
    assert len(results) == 8  # and each process holds half, of uint8 too
    wrong = {("float16", "bfloat16"): "wrong by", ("float32", "bfloat16"): "RuntimeError: shape"}
    for case, result in results.items():
        assert result.startswith(wrong.get(case, "the same")), case
    sent, held = _printed("bytes counted by the hook").rsplit("\n", 2)[-2].split(" | ")
    assert sent.split()[-1] == held.split()[-1]
