"""Notebook 09: the configurations it counts with, what its collator and packing compute, and the benchmark."""

import ast
import copy
import json
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import helpers
from helpers import data
from helpers.data import LogitsToKeepCollator
from helpers.makers import benchmark
from helpers.makers.benchmark import Recipe
from helpers.models import TINY, load_base, load_tokenizer

import nbformat
import pytest
import shared
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DataCollatorForSeq2Seq, PrinterCallback
from transformers.trainer_pt_utils import get_length_grouped_indices

pytestmark = pytest.mark.slow
CONFIGS = Path(helpers.__file__).parent / "assets" / "configs"
NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "09_memory_and_speed.ipynb"
# As the model cards on the Hugging Face hub give them for the published safetensors.
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "smollm2-1.7b": 1_711_376_384,
    "qwen2.5-3b": 3_085_938_688,
    "llama-3.1-8b": 8_030_261_248,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "llama-3.1-70b": 70_553_706_496,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
}
SHAPES = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "tie_word_embeddings", "max_position_embeddings", "hidden_act",
)  # fmt: skip


def test_parameters_are_as_many_as_published():
    assert {path.stem for path in CONFIGS.iterdir()} == set(PUBLISHED)
    for name, count in PUBLISHED.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(CONFIGS / f"{name}.json"))
        assert sum(parameter.numel() for parameter in model.parameters()) == count, name


def test_the_configuration_of_smollm2_is_the_model_s(smollm2):
    ours, model_s = (AutoConfig.from_pretrained(path) for path in (CONFIGS / "smollm2-135m.json", smollm2))
    assert {name: getattr(ours, name) for name in SHAPES} == {name: getattr(model_s, name) for name in SHAPES}


def notebook_s_collator():
    """The class LogitsToKeepCollator as the notebook defines it."""
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code" and "class LogitsToKeepCollator" in cell.source:
            tree = ast.parse(cell.source)
            tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef)]
            namespace = {"data": data, "torch": torch, "copy": copy, "Any": Any}
            namespace |= {"DataCollatorForSeq2Seq": DataCollatorForSeq2Seq, "PreTrainedTokenizerBase": object}
            exec(compile(tree, "notebook", "exec"), namespace)
            return namespace["LogitsToKeepCollator"]
    raise AssertionError("the notebook has no LogitsToKeepCollator")


@pytest.fixture(scope="module")
def encoded():
    return list(shared.encoded(40))


@pytest.fixture
def exact():
    return shared.adapter(target_modules="all-linear", init_lora_weights=False).double()


def loss_and_gradient(model, batch, **options):
    model.zero_grad()
    loss = model(**batch, **options).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("collator", [LogitsToKeepCollator, notebook_s_collator()], ids=["helpers", "notebook"])
@pytest.mark.parametrize("items", [None, torch.tensor(77)])
def test_logits_of_label_columns_give_the_same_loss_and_gradient(collator, items, exact, encoded):
    tokenizer = load_tokenizer()
    options = {} if items is None else {"num_items_in_batch": items}
    plain = DataCollatorForSeq2Seq(tokenizer)(encoded[:5])
    loss, gradient = loss_and_gradient(exact, plain, **options)
    batch = collator(tokenizer)(encoded[:5])
    fewer_loss, fewer_gradient = loss_and_gradient(exact, batch, **options)
    assert fewer_loss == pytest.approx(loss, rel=1e-6)  # the loss is taken in float32
    assert torch.allclose(fewer_gradient, gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max().item())
    logits = exact(**batch).logits
    # Padded on the left: each row with its own tokens and labels, and the completions in the same last columns.
    assert logits.shape[1] == len(batch["logits_to_keep"]) == (plain["labels"] != data.IGNORE_INDEX).sum(dim=1).max()
    assert batch["attention_mask"][:, -1].all()
    for name in ("input_ids", "labels"):
        assert torch.equal(batch[name][batch["attention_mask"] == 1], plain[name][plain["attention_mask"] == 1])


# What the benchmark's recipes are.


@pytest.fixture
def on_tiny(monkeypatch):
    monkeypatch.setenv("LORA_LAB_DEVICE", "cpu")
    monkeypatch.setattr(benchmark, "MODEL", "tiny")
    monkeypatch.setattr(benchmark, "BATCH_SIZE", 4)


def trained(recipe, tmp_path, steps=2):
    torch.manual_seed(0)
    model, tokenizer = load_base("tiny", dtype=torch.float32, device="cpu"), load_tokenizer()
    trainer = benchmark.build(recipe, model, tokenizer, steps, str(tmp_path))
    trainer.remove_callback(PrinterCallback)
    trainer.args.logging_steps = trainer.state.logging_steps = 1
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated")
def test_a_recipe_changes_what_it_says_and_no_more(on_tiny, tmp_path):
    plain, losses = trained(Recipe("plain"), tmp_path)
    columns, losses_of_columns = trained(Recipe("columns", labels_only=True), tmp_path)
    recomputing, losses_of_recomputing = trained(Recipe("checkpointing", checkpointing=True), tmp_path)
    grouped, losses_of_grouped = trained(Recipe("grouped", grouped=True), tmp_path)
    rounded, losses_of_rounded = trained(Recipe("bfloat16", bf16=True), tmp_path)
    assert losses_of_columns == pytest.approx(losses, abs=1e-4)
    assert losses_of_recomputing == pytest.approx(losses, abs=1e-4)
    assert losses_of_grouped != pytest.approx(losses, abs=1e-2)  # other batches
    assert losses_of_rounded == pytest.approx(losses, abs=0.05)
    assert losses_of_rounded != pytest.approx(losses, abs=1e-5)
    assert {p.dtype for p in rounded.model.parameters()} == {torch.float32}
    assert recomputing.model.base_model.model.model.layers[0].gradient_checkpointing
    assert not plain.model.base_model.model.model.layers[0].gradient_checkpointing
    assert isinstance(columns.data_collator, LogitsToKeepCollator)

    def spread(trainer):  # of the lengths in a batch
        batches = [batch["attention_mask"].sum(dim=1) for batch in trainer.get_train_dataloader()]
        return sum((lengths.max() - lengths.min()).item() for lengths in batches)

    assert spread(grouped) < spread(plain) / 2


def test_the_last_third_is_the_last_third(on_tiny, tmp_path):
    deep = AutoConfig.from_pretrained(TINY, num_hidden_layers=7)
    model = AutoModelForCausalLM.from_config(deep)
    recipe = Recipe("third", last_third=True, rank=6, learning_rate=7e-3)
    trainer = benchmark.build(recipe, model, load_tokenizer(), 1, str(tmp_path))
    assert trainer.args.learning_rate == 7e-3
    options = trainer.model.peft_config["default"]
    assert (options.r, options.lora_alpha) == (6, 12)
    names = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert {name.split(".layers.")[1].split(".")[0] for name in names} == {"5", "6"}
    assert {name.split(".lora_")[0].split(".")[-1] for name in names} == set(benchmark.ALL_LINEAR)


def test_recipes_take_turns_and_go_to_the_end(on_tiny, capsys):
    recipes = (Recipe("plain", full_run=True), Recipe("columns", labels_only=True))
    first, second = benchmark.run(recipes, steps=3, few_steps=2, test_rows=4)
    assert [len(first["seconds"]), len(second["seconds"])] == [3, 2]
    assert min(first["seconds"] + second["seconds"]) > 0
    assert 0 < first["test_loss"] < 10
    assert 0 <= first["exact_match"] <= 1
    assert "test_loss" not in second
    assert "step 3 of 3" in capsys.readouterr().out
    json.dumps([first, second])


def test_recipes_in_one_process_keep_their_own_precision(on_tiny):
    plain = Recipe("plain", learning_rate=5e-3, full_run=True)
    recipes = (plain, replace(plain, name="bfloat16", bf16=True), replace(plain, name="again"))
    losses = {record["name"]: record["test_loss"] for record in benchmark.run(recipes, 3, 3, 2)}
    assert losses["again"] == losses["plain"]
    assert losses["bfloat16"] != losses["plain"]
    assert losses["bfloat16"] == pytest.approx(losses["plain"], rel=0.02)


def test_a_recipe_in_bfloat16_is_evaluated_in_float32(on_tiny, monkeypatch):
    dtypes = set()

    def look(model, *arguments):
        projection = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer")
        hook = projection.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
        model(input_ids=torch.tensor([[1, 2, 3]]))
        hook.remove()
        return 1.0

    monkeypatch.setattr(benchmark.evaluation, "completion_loss", look)
    benchmark.run((Recipe("bfloat16", bf16=True, full_run=True),), 1, 1, 1)
    assert dtypes == {torch.float32}


def test_a_recipe_that_fails_is_named(on_tiny, monkeypatch):
    def fail(*arguments):
        raise KeyError("no")

    tracebacks = []
    monkeypatch.setattr(threading, "excepthook", tracebacks.append)
    monkeypatch.setattr(benchmark, "build", fail)
    with pytest.raises(RuntimeError, match="'broken' ended early"):
        benchmark.run((Recipe("broken"),), steps=1, few_steps=1, test_rows=1)
    for thread in threading.enumerate():
        if "(_run)" in thread.name:
            thread.join(10)
    assert [traceback.exc_type for traceback in tracebacks] == [KeyError]


def test_speed_is_steps_per_second_of_the_same_turns():
    records = [
        {"name": "plain", "seconds": [4.0, 2.0, 6.0, 100.0]},
        {"name": "twice", "seconds": [2.0, 1.0, 3.0, 50.0]},
        {"name": "disturbed, a few steps", "seconds": [2.0, 10.0, 3.0]},
    ]
    speed = benchmark.speedups(records)
    assert speed["plain"] == (1, 1)
    assert speed["twice"] == (2, 2)
    assert speed["disturbed, a few steps"] == (pytest.approx(12 / 15), 2)


def test_only_whole_groups_of_batches_count():
    of_plain, of_grouped = [6.0] * 30, ([6.0] * 6 + [2.0] * 6) * 2 + [6.0] * 6
    records = [{"name": "plain", "seconds": of_plain}, {"name": "grouped", "seconds": of_grouped}]
    assert benchmark.speedups(records)["grouped"][0] == pytest.approx(6 / 4)
    rows = get_length_grouped_indices(list(range(400)), benchmark.BATCH_SIZE)
    longest_of_batches = [rows[start] for start in range(0, 400, benchmark.BATCH_SIZE)]
    group = longest_of_batches[benchmark.GROUP : 2 * benchmark.GROUP]
    assert group == sorted(group, reverse=True)
    assert longest_of_batches[2 * benchmark.GROUP] > group[-1]


def test_the_stored_record_is_complete():
    record = json.loads(benchmark.RECORD.read_text(encoding="utf-8"))
    compared = [recipe for recipe in record["recipes"] if recipe["full_run"]]
    assert len(compared) == 5
    assert len({recipe["adapter_parameters"] for recipe in compared}) == 1
    names = [recipe["name"] for recipe in record["recipes"]]
    assert names == [recipe.name for recipe in benchmark.RECIPES]
    for recipe, stored in zip(benchmark.RECIPES, record["recipes"], strict=True):
        steps = record["settings"]["steps" if recipe.full_run else "few_steps"]
        assert len(stored["seconds"]) == steps
        assert ("exact_match" in stored) == ("test_loss" in stored) == recipe.full_run
        settings = asdict(recipe) | {"targets": list(recipe.targets)}
        assert {name: stored[name] for name in settings} == settings
    assert {"torch", "transformers", "peft", "accelerate", "trl"} <= record["versions"].keys()
    assert record["settings"]["steps"] == 36
    assert record["speed"] == {name: list(pair) for name, pair in benchmark.speedups(record["recipes"]).items()}


def test_the_command_writes_a_record_and_leaves_trl_out_where_there_is_none(on_tiny, monkeypatch, tmp_path, capsys):
    out = tmp_path / "new" / "record.json"
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(benchmark, "RECIPES", (Recipe("plain"), Recipe("TRL", trl=True)))
    arguments = ["benchmark", "--steps", "2", "--few-steps", "1", "--test-rows", "2", "--out", str(out)]
    monkeypatch.setattr("sys.argv", arguments)
    benchmark.main()
    record = json.loads(out.read_text(encoding="utf-8"))
    assert [recipe["name"] for recipe in record["recipes"]] == ["plain"]
    assert "trl" not in record["versions"]
    assert [path.name for path in out.parent.iterdir()] == ["record.json"]
    printed = capsys.readouterr().out
    assert "TRL is left out: it is not installed" in printed
    assert "plain" in printed
