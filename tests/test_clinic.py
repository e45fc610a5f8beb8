"""Notebook 10's patients: each fault is in its run, what should find it does, and the fixed run has no finding."""

import inspect
import warnings

from helpers.data import IGNORE_INDEX, load_commands
from helpers.diagnose import diagnose, gradient_report
from helpers.evaluation import completion_loss, exact_match
from helpers.labs import clinic
from helpers.labs.clinic_cases import CASES
from helpers.models import enable_checkpointing, load_tokenizer
from helpers.watch import DiagnosticsCallback

import pytest
import torch
from peft import PeftModel

BY_NAME = {case.build.__name__: case for case in CASES}
INSIDE = [name for name, case in BY_NAME.items() if case.found_by != "comparison"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clinic")
    clinic.trained_adapter(folder)
    return folder


def said(name, folder, fixed):
    """Train a patient under the callback and return what it says; "stops" if it raised."""
    trainer, watch = BY_NAME[name].build(folder, fixed), DiagnosticsCallback()
    trainer.add_callback(watch)
    if BY_NAME[name].found_by == "diagnose":
        trainer.args.per_device_train_batch_size = 2
    trainer.args.max_steps = 3 if BY_NAME[name].found_by == "diagnose" else 6  # the log and the evaluation come later
    with warnings.catch_warnings(action="ignore"):
        try:
            trainer.train(resume_from_checkpoint=BY_NAME[name].resume and not fixed)
        except FloatingPointError:
            return [*(finding.code for finding in watch.findings), "stops"]
    return [finding.code for finding in watch.findings]


def first_batch(trainer):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(4)])


def test_there_are_enough_patients_and_each_is_charted():
    assert len(CASES) >= 12
    assert len(BY_NAME) == len(CASES)
    for case in CASES:
        assert case.found_by in ("diagnose", "callback", "comparison")
        assert 0 <= case.right < len(case.guesses)
        assert len(case.guesses) >= 3
        assert inspect.getdoc(case.build)


@pytest.mark.slow
@pytest.mark.parametrize("name", INSIDE)
def test_the_callback_finds_the_fault_and_nothing_in_the_fixed_run(name, folder):
    assert BY_NAME[name].code in said(name, folder, fixed=False)
    assert said(name, folder, fixed=True) == []


@pytest.mark.parametrize("name", [name for name in INSIDE if BY_NAME[name].found_by == "diagnose"])
def test_diagnose_finds_it_before_the_first_step(name, folder):
    for fixed in (False, True):
        with warnings.catch_warnings(action="ignore"):
            trainer = BY_NAME[name].build(folder, fixed)
            if trainer.args.gradient_checkpointing:
                enable_checkpointing(trainer.model)
            trainer.model.train()
            optimizer = trainer.optimizer or trainer.create_optimizer()
            found = [finding.code for finding in diagnose(trainer.model, first_batch(trainer), optimizer)]
        assert found == ([] if fixed else [BY_NAME[name].code])


# The four that nothing inside a run can find: the callback is silent, and the comparison decides


@pytest.mark.slow
def test_a_rate_that_is_too_low_is_found_by_a_higher_one(folder):
    assert said("rate_too_low", folder, fixed=False) == []
    ends = []
    for factor in (1, 100):
        trainer = clinic.new_trainer(folder, learning_rate=2e-5 * factor, max_steps=6)
        trainer.train()
        ends.append(sum(entry["loss"] for entry in trainer.state.log_history[3:6]) / 3)
    assert ends[0] > ends[1] + 0.5


def test_labels_on_the_prompt_are_seen_when_they_are_decoded(folder):
    assert said("prompt_not_masked", folder, fixed=False) == []
    tokenizer = load_tokenizer("tiny")
    for fixed in (False, True):
        row = clinic.prompt_not_masked(folder, fixed).train_dataset[0]
        decoded = tokenizer.decode([label for label in row["labels"] if label != IGNORE_INDEX])
        whole = load_commands("train")[0]
        assert decoded == ("" if fixed else whole["prompt"]) + whole["completion"] + tokenizer.eos_token


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wrong_base", "merged_twice"])
def test_the_fingerprint_tells_another_base(name, folder):
    own = clinic.base_fingerprint(clinic.load_tiny())
    sick, fixed = (BY_NAME[name].build(folder, state) for state in (False, True))
    assert clinic.base_fingerprint(fixed.model) == own
    assert clinic.base_fingerprint(sick.model) != own
    assert sick.evaluate()["eval_loss"] > 1.5 * fixed.evaluate()["eval_loss"]


def test_the_fingerprint_is_that_of_the_base_to_the_bit():
    base = clinic.load_tiny()
    own = clinic.base_fingerprint(base)
    adapted = clinic.new_adapter(clinic.load_tiny(), target_modules=["q_proj", "embed_tokens"])
    with torch.no_grad():
        next(p for name, p in adapted.named_parameters() if "lora_B" in name).add_(1)
    assert clinic.base_fingerprint(adapted) == own
    with torch.no_grad():
        weight = base.model.norm.weight
        weight[5] = torch.nextafter(weight[5], torch.tensor(9.0))
    assert clinic.base_fingerprint(base) != own
    assert clinic.base_fingerprint(clinic.load_base("tiny", dtype=torch.bfloat16)) != own


def test_four_fixed_runs_are_the_healthy_run(folder):
    """The notebook shows the healthy run for three of them; case 1 logs another way, and the rest is the same."""
    healthy = clinic.new_trainer(folder)
    for name in ("missing_minus_sign", "rate_too_high", "rate_too_low", "prompt_not_masked"):
        fixed = BY_NAME[name].build(folder, fixed=True)
        own, others = ({**trainer.args.to_dict(), "logging_steps": 1} for trainer in (fixed, healthy))
        assert own == others
        assert fixed.train_dataset.to_list() == healthy.train_dataset.to_list()
        pairs = zip(fixed.model.state_dict().values(), healthy.model.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_half_of_the_targets_is_half_of_the_layers(folder):
    sick, fixed = (clinic.half_of_the_targets(folder, state).model for state in (False, True))
    assert len(sick.targeted_module_names) == 8
    assert len(fixed.targeted_module_names) == 20


def test_only_the_final_norm_gets_a_gradient_where_checkpointing_cuts_it(folder):
    for fixed in (False, True):
        trainer = clinic.gradients_cut(folder, fixed)
        trainer.model.train()
        with warnings.catch_warnings(action="ignore"):
            trainer.model(**first_batch(trainer)).loss.backward()
        report = gradient_report(trainer.model).query("requires_grad").set_index("name")["state"]
        (norm,) = [name for name in report.index if "lora_" not in name]
        assert norm.endswith("model.norm.modules_to_save.default.weight")
        assert report[norm] == "ok"
        assert (report.drop(norm) == "no gradient").all() != fixed


@pytest.mark.slow
def test_a_model_that_waits_for_another_eos_goes_on_after_its_answer(folder):
    tokenizer, questions = load_tokenizer("tiny"), clinic.which_device("validation").select(range(6))
    sick, fixed = (clinic.eos_of_two_minds(folder, state) for state in (False, True))
    for trainer in (sick, fixed):
        trainer.train()
    answers = exact_match(sick.model, tokenizer, questions, max_new_tokens=12)
    assert answers.score == 0
    ended = [f"{row.expected}{tokenizer.eos_token}" for row in answers.rows.itertuples()]
    assert sum(map(str.startswith, answers.rows["answer"], ended)) >= 5
    assert exact_match(fixed.model, tokenizer, questions, max_new_tokens=12).score >= 5 / 6
    weights = zip(sick.model.parameters(), fixed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


def test_with_its_tokenizer_the_trainer_would_hide_that(folder):
    trainer = clinic.eos_of_two_minds(folder)
    trainer.processing_class, trainer.args.max_steps = load_tokenizer("tiny"), 1
    trainer.train()
    assert diagnose(trainer.model, first_batch(trainer)) == []


@pytest.mark.slow
def test_labels_that_are_shifted_twice_teach_the_token_after_the_next(folder):
    tokenizer, questions = load_tokenizer("tiny"), load_commands("validation").select(range(12))
    scores, ends = [], []
    for fixed in (False, True):
        trainer = clinic.labels_shifted_twice(folder, fixed)
        row = trainer.train_dataset[0]
        counts = [place for place, label in enumerate(row["labels"]) if label != IGNORE_INDEX]
        assert [row["labels"][i] for i in counts] == [row["input_ids"][i + (not fixed)] for i in counts]
        trainer.train()
        ends.append(sum(entry["loss"] for entry in trainer.state.log_history[-4:-1]) / 3)
        scores.append(exact_match(trainer.model, tokenizer, questions).score)
    assert max(ends) < 1
    assert scores[0] == 0
    assert scores[1] > 0.25


@pytest.mark.slow
def test_what_a_model_that_is_wrapped_twice_saves_does_not_load_on_the_base(folder, tmp_path):
    tokenizer, rows = load_tokenizer("tiny"), load_commands("validation")
    base = completion_loss(clinic.load_tiny(), tokenizer, rows)
    for fixed in (False, True):
        with warnings.catch_warnings(action="ignore"):
            trainer, saved = clinic.cell_run_twice(folder, fixed), tmp_path / str(fixed)
            trainer.train()
            trainer.save_model(str(saved))
            model = PeftModel.from_pretrained(clinic.load_tiny(), saved, is_trainable=True)
        trained = completion_loss(trainer.model, tokenizer, rows)
        assert trained < base - 1
        assert completion_loss(model, tokenizer, rows) == pytest.approx(trained if fixed else base)
        found = [finding.code for finding in diagnose(model, adapter=saved)]
        assert found == ([] if fixed else ["adapter-not-loaded"])
