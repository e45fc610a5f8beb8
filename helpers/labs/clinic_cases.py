"""The charts of notebook 10's patients: what a reader may guess, what it would show, and what finds the fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from helpers.labs import clinic

from transformers import Trainer


class Case(NamedTuple):
    """One patient.

    Attributes:
        build: makes the run, `build(folder)`, or with `fixed=True` the run without the fault.
        guesses: each answer to "what is wrong?" and, to be read after it is given, what speaks for or against it.
        right: the position of the right one.
        found_by: "diagnose" (helpers.diagnose), "callback" (helpers.watch), or "comparison": nothing in the run.
        code: of the finding; "stops" where the callback raises; or the comparison that decides.
        resume: the run is to be started with train(resume_from_checkpoint=True).
        trains: False for an adapter that is only loaded, and evaluated.
    """

    build: Callable[..., Trainer]
    guesses: dict[str, str]
    right: int
    found_by: str
    code: str
    resume: bool = False
    trains: bool = True


CASES = (  # in the order of the notebook
    Case(
        clinic.missing_minus_sign,
        {
            "The run has diverged, and the log hides it": "The Trainer leaves a loss that is NaN out of its log, and "
            "shows 0.0 where none remains. Nothing hides the gradient norm.",
            "The model has learned the task by heart": "Then the gradient would be small, and not NaN; and no loss is "
            "exactly 0.0.",
            "All labels are masked": "Then the first entry would be 0.0 too, and the gradient would be zero.",
        },
        0,
        "callback",
        "stops",
    ),
    Case(
        clinic.labels_all_masked,
        {
            "The adapter is frozen": "Then the loss would stand still at its first value, above 3.",
            "No token has a label": "With nothing to predict there is no loss, and the gradient of nothing is zero.",
            "The run has diverged": "Then the gradient norm would be NaN, and the first entries would not be 0.0.",
        },
        1,
        "diagnose",
        "no-labels",
    ),
    Case(
        clinic.loaded_for_inference,
        {
            "The learning rate is 0": "Then the gradient would still be there: the norm is taken before the update.",
            "The adapter has learned all it can": "Then some gradient would remain, from batch to batch another one.",
            "Nothing is trainable": "No parameter asks for a gradient, so the norm over all of them is exactly 0.",
        },
        2,
        "diagnose",
        "no-trainable-parameters",
    ),
    Case(
        clinic.optimizer_too_early,
        {
            "The optimizer does not hold the adapter": "The gradients are of a healthy size, and nothing uses them.",
            "The adapter is frozen": "Then there would be no gradient: the norm would be 0.",
            "The loss sends no gradient to the adapter": "Then the norm would be 0, or far smaller than in a good run.",
        },
        0,
        "diagnose",
        "not-in-optimizer",
    ),
    Case(
        clinic.gradients_cut,
        {
            "The learning rate is too low": "It is the healthy one; and the rate does not change the first gradient.",
            "Most of what trains gets no gradient": "The norm starts at a tenth of the healthy one or less, before any "
            "update: a part is missing, and it is the larger one.",
            "The batches are too small": "They are those of the healthy run.",
        },
        1,
        "diagnose",
        "no-gradient",
    ),
    Case(
        clinic.rate_too_high,
        {
            "A batch of bad rows": "One bad batch makes one spike; here the loss does not come back.",
            "The run has diverged to NaN": "Every number is finite.",
            "The learning rate is too high": "The first updates help, the next throw the weights far off, and when the "
            "schedule lowers the rate the loss settles above its start.",
        },
        2,
        "callback",
        "worse-than-guessing",
    ),
    Case(
        clinic.rate_too_low,
        {
            "The optimizer does not hold the adapter": "Then the adapter would not have moved at all, not even by a "
            "little: the measurement below decides.",
            "The learning rate is too low": "Gradients are healthy and the adapter moves, but by far too little.",
            "The adapter gets no gradient": "The gradient norm is that of the healthy run.",
        },
        1,
        "comparison",
        "the same run at other rates",
    ),
    Case(
        clinic.half_of_the_targets,
        {
            "The learning rate is too low": "It is the healthy one; and no rate changes the first gradient, "
            "which is smaller here.",
            "The adapter sits on too few layers": "The first gradient norm is smaller before anything was "
            "learned, so there are fewer matrices, or others.",
            "The base is not the one you think": "Then the first loss would be another one.",
        },
        1,
        "diagnose",
        "partial-targets",
    ),
    Case(
        clinic.adapter_in_bfloat16,
        {
            "The adapter is kept in too few bits": "An update smaller than half the distance to the next number is "
            "rounded away.",
            "A part of the layers is not adapted": "Then whole matrices would stand still. Every one has moved, "
            "as the measurement shows, but not every entry.",
            "The gradients of these entries are zero": "Then they would not have moved in float32 either.",
        },
        0,
        "diagnose",
        "low-precision-adapter",
    ),
    Case(
        clinic.ignored_on_resume,
        {
            "The new rate is too low as well": "It is the one of the healthy run, which learns at once.",
            "The checkpoint is damaged": "Then the run would start from another loss, or not at all.",
            "The new rate is not in use": "The optimizer is the checkpoint's, and its rate came with it.",
        },
        2,
        "callback",
        "settings-ignored",
        resume=True,
    ),
    Case(
        clinic.prompt_not_masked,
        {
            "The loss is taken on the prompt too": "The first loss is another one, before any update: a mean "
            "over other tokens.",
            "The model overfits": "After twelve updates, which have seen no row twice, there is nothing to overfit.",
            "The learning rate is too high": "Then the loss would jump, and the first loss would be the usual one.",
        },
        0,
        "comparison",
        "the labels, decoded",
    ),
    Case(
        clinic.padded_with_eos,
        {
            "It was trained for too few steps": "It answers with devices, so it has learned the form. More of the same "
            "would teach it no end: see the measurement.",
            "Generation has no stop token": "It is set, to the EOS of the tokenizer; the model does not produce it.",
            "The end of the text was never a label": "What is never a label is never learned.",
        },
        2,
        "diagnose",
        "eos-not-learned",
    ),
    Case(
        clinic.eos_of_two_minds,
        {
            "The end of the text was never a label": "Then the model would not write it; it does, after the first "
            "word, and goes on.",
            "The model waits for another token": "It writes the end that it has learned, and generation stops at what "
            "the model's config says.",
            "It was trained for too few steps": "The word is right, and the end comes after it: there is nothing left "
            "to learn.",
        },
        1,
        "diagnose",
        "eos-of-two-minds",
    ),
    Case(
        clinic.labels_shifted_twice,
        {
            "It was trained for too few steps": "The mended run below is as long, and answers.",
            "Generation stops at the wrong token": "Then the answers would begin well, and only their end be wrong.",
            "It learns the token after the next": "Its answers leave tokens out, and its first loss is that of a model "
            "that is sure of something else.",
        },
        2,
        "diagnose",
        "shifted-labels",
    ),
    Case(
        clinic.evaluated_in_train_mode,
        {
            "The weights change between the calls": "Nothing steps in between: a forward pass changes no weight here.",
            "Dropout is active": "It draws new random numbers at each call, and leaves out a part of the adapter.",
            "Rounding": "The same numbers in the same order are rounded alike on one machine.",
        },
        1,
        "callback",
        "evaluated-in-train-mode",
    ),
    Case(
        clinic.duplicates_in_both_splits,
        {
            "The other devices are harder": "All codes are drawn alike, and none can be guessed.",
            "The held-out rows are too few": "Few rows make a loss uncertain, in both directions; here it follows the "
            "training loss all the way down.",
            "The held-out rows were trained on": "The held-out loss falls with the training loss, and what was never "
            "seen does not.",
        },
        2,
        "callback",
        "evaluation-leak",
    ),
    Case(
        clinic.cell_run_twice,
        {
            "The names in the file are not the base's": "Then nothing is loaded, and the fresh adapter that stands in "
            "its place changes nothing.",
            "The adapter was saved before the training": "Then the names would be right, and a part of the file zero.",
            "The base is another one": "It is the one that was trained on, loaded again.",
        },
        0,
        "diagnose",
        "nested-adapter",
    ),
    Case(
        clinic.wrong_base,
        {
            "The adapter file is damaged": "It is the file that scores well in the other run.",
            "The base is another one": "An adapter is a change to particular weights. On others it fits less "
            "well, or not at all.",
            "The adapter is not active": "Then the loss would be that of the base alone, which is above 3 on "
            "both machines, as the measurement shows.",
        },
        1,
        "comparison",
        "the base's fingerprint",
        trains=False,
    ),
    Case(
        clinic.merged_twice,
        {
            "The adapter is applied twice": "The base already contains it: the update is twice as large.",
            "Merging rounds the weights": "In float32 the rounding is in the seventh digit.",
            "The scaling alpha / r was forgotten": "Then the update would be half as large here, and not twice.",
        },
        0,
        "comparison",
        "the base's fingerprint",
        trains=False,
    ),
)
