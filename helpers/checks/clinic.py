"""The exercises of notebook 10_debugging_clinic: a right answer, and the likely wrong ones, each with its hint."""

from __future__ import annotations

import copy
import hashlib
import math
from typing import Any

from helpers.checks.base import Answer, Exercise, Hint

import torch
from torch import Tensor

NAN = math.nan
Log = list[dict[str, float]]


def _log(losses: list[float], norms: list[float]) -> Log:
    pairs = zip(losses, norms, strict=True)
    return [{"step": i, "loss": loss, "grad_norm": norm} for i, (loss, norm) in enumerate(pairs, start=1)]


FALLING, NORMS = [3.6, 2.9, 1.8, 1.2], [3.0, 2.0, 1.0, 0.5]
END: Log = [{"step": 4, "eval_loss": 1.1}, {"step": 4, "train_loss": 2.2, "train_runtime": 1.0}]
LOGS = {
    "the loss falls": _log(FALLING, NORMS),
    "losses end at 0.0, gradient norms are NaN": _log([3.6, 8.6, 0.0, 0.0], [3.5, NAN, NAN, NAN]),
    "the last gradient norm is inf": _log(FALLING, [3.0, 2.0, 1.0, math.inf]),
    "all losses are 0.0 and all gradient norms NaN": _log([0.0] * 4, [NAN] * 4),
    "a loss jumps, and the norms are NaN from then": _log([3.6, 3.6, 8.6, 0.0], [3.0, 3.0, NAN, NAN]),
    "all losses and all gradient norms are 0": _log([0.0] * 4, [0.0] * 4),
    "all gradient norms are 0, and the losses are not": _log([1.1, 1.0, 1.1, 1.0], [0.0] * 4),
    "all gradient norms are 0, and the losses fall": _log([3.0, 2.0, 1.0, 1.0], [0.0] * 4),
    "the loss is flat": _log([3.6, 3.5, 3.5, 3.6], NORMS),
    "the loss rises": _log([2.0, 2.2, 4.5, 6.0], NORMS),
    "the second half is 0.96 times the first": _log([1.0, 1.0, 0.96, 0.96], NORMS),
    "the second half is 0.94 times the first": _log([1.0, 1.0, 0.94, 0.94], NORMS),
    "there are five entries, the middle one low": _log([1.0, 1.0, 0.1, 1.0, 1.0], [1.0] * 5),
    "one loss and its gradient norm are 0": _log([2.0, 0.0, 0.5, 0.4], [1.0, 0.0, 1.0, 1.0]),
    "there are entries of an evaluation and of the end": END[:1] + _log(FALLING, NORMS) + END,
}
VERDICTS = ("diverged", "no labels", "no gradient", "not learning", "healthy")


def _triage(
    order: str = "dead zero flat", keep: Answer = lambda entry: "loss" in entry, limit: float = 0.95,
    dead: Answer = lambda losses, norms: not all(map(math.isfinite, norms)),
    all_zero: Answer = lambda losses, norms: not any(norms),
    zero: Answer = lambda losses: "no gradient" if any(losses) else "no labels",
    flat: Answer = lambda first, second, limit: second > limit * first,
    half: Answer = lambda losses: len(losses) // 2,
) -> Answer:  # fmt: skip
    """Return an answer in which a question, or their order, is exchanged."""

    def function(log: Log) -> str:
        entries = [entry for entry in log if keep(entry)]
        losses, norms = [entry["loss"] for entry in entries], [entry["grad_norm"] for entry in entries]
        first, second = losses[: half(losses)], losses[half(losses) :]
        questions = {
            "dead": lambda: "diverged" if dead(losses, norms) else "",
            "zero": lambda: zero(losses) if all_zero(losses, norms) else "",
            "flat": lambda: flat(sum(first) / len(first), sum(second) / len(second), limit) and "not learning",
        }
        return next((verdict for question in order.split() if (verdict := questions[question]())), "healthy")

    return function


def _losses_only(log: Log) -> str:
    losses = [entry["loss"] for entry in log if "loss" in entry]
    if not any(losses):
        return "no labels"
    return "not learning" if losses[-1] > 0.95 * losses[0] else "healthy"


def _triage_hint(log: Log, found: Any, right: str) -> str:
    if found not in VERDICTS:
        return f"It returns {found!r}; return one of {', '.join(map(repr, VERDICTS))}."
    words = next(words for words, case in LOGS.items() if case is log)
    return f"Where {words}, it should say {right!r}, and it says {found!r}."


triage = Exercise(
    right=_triage(),
    cases=[(log,) for log in LOGS.values()],
    mistakes={
        f"It says {verdict!r} of every log.": lambda log, verdict=verdict: verdict for verdict in VERDICTS
    } | {
        "An entry of an evaluation has no 'loss': take only the entries with a 'loss'.": [
            _triage(keep=lambda entry: True), _triage(keep=lambda entry: "loss" in entry or "eval_loss" in entry)],
        "A run that is dead or without a gradient may have a flat loss as well: compare the halves last.": [
            _triage(order) for order in ("zero flat dead", "flat dead zero", "flat zero dead", "dead flat zero")],
        "A run that has diverged may have losses of 0: ask for that first, and of the gradient norms, since the "
        "Trainer leaves a loss that is NaN out of its log.": [
            _triage(dead=lambda losses, norms: not all(map(math.isfinite, losses))), _triage("flat zero"),
            _triage("zero dead", all_zero=lambda losses, norms: not any(losses)),
            _triage("zero dead flat", all_zero=lambda losses, norms: not any(losses)), _losses_only],
        "A gradient norm of inf is no number either: math.isfinite is False for both.":
            _triage(dead=lambda losses, norms: any(map(math.isnan, norms))),
        "All gradient norms are 0 in two of the cases: which it is, the losses say.":
            _triage(zero=lambda losses: "no gradient"),
        "One batch without labels is no verdict on the run: all losses have to be 0, and all norms.":
            _triage(all_zero=lambda losses, norms: 0 in norms),
        "Where gradient norms are 0 and the losses are not, there are labels: look at both.":
            _triage(zero=lambda losses: "no labels"),
        "The limit is 0.95 times the mean of the first half: 0.96 is 'not learning', 0.94 is 'healthy'.": [
            _triage(limit=1.0), _triage(limit=0.9)],
        "A loss that rises is not learning either: compare without taking the absolute value.":
            _triage(flat=lambda first, second, limit: abs(first - second) < (1 - limit) * first),
        "Of five entries the first two are the first half, and the mean of each half is over its own entries.": [
            _triage(half=lambda losses: (len(losses) + 1) // 2)],
    },
    returns=f"one of {', '.join(map(repr, VERDICTS))}",
    otherwise=_triage_hint,
    learned="A dead run logs a loss of 0, so the gradient is asked first.",
)  # fmt: skip


def _flat(text: str) -> str:
    return " ".join(text.lower().split())


def _leaked(plain: Answer = _flat) -> Answer:
    """Return an answer that compares the texts in this plain form."""

    def function(train: list[str], test: list[str]) -> list[int]:
        seen = {plain(text) for text in train}
        return [i for i, text in enumerate(test) if plain(text) in seen]

    return function


class _Counted(str):
    """A text that counts, for all of them, how often one is converted."""

    __slots__ = ()
    calls = 0

    def lower(self) -> str:
        _Counted.calls += 1
        return str(self).lower()

    casefold = lower


def _looks_up(answer: Answer) -> None:
    _Counted.calls = 0
    answer(*([_Counted(f"{word} {i}") for i in range(60)] for word in ("text", "other")))
    if _Counted.calls > 600:
        raise Hint(
            f"For 60 and 60 texts it converts {_Counted.calls} times: convert each text once, and look it up in a set."
        )


def _leaked_hint(train: list[str], test: list[str], found: list[Any], right: list[int]) -> str:
    if any(isinstance(item, str) for item in found):
        return "It returns texts; return their positions in `test`."
    if found != sorted(set(found)):
        return "Each position once, and in rising order."
    position = min(set(found) ^ set(right))
    if position in right:
        return f"{test[position]!r} is a copy too: case and white space do not matter, of any kind, also at the ends."
    return f"{test[position] if position < len(test) else position!r} is not in train."


TEXTS = (
    ["Turn on the fan.", "Set the oven\tto 200.", "  Lamp off ", "Straße frei", "on the way"],
    ["turn ON the fan.", "Set  the oven to\n200.", "lamp off", "Turn off the fan.", "Turnon the fan.", "the way",
     "Turn on the fan", "LAMP\u00a0OFF\n", "Lamp off"],
)  # fmt: skip
leaked = Exercise(
    right=_leaked(),
    cases=[TEXTS],
    mistakes={
        "It returns True and False; return the positions in `test`.":
            lambda train, test: [i in _leaked()(train, test) for i in range(len(test))],
        "These are the positions of the texts that are not in train.":
            lambda train, test: [i for i in range(len(test)) if i not in _leaked()(train, test)],
        "These are positions in `train`, or copies are left out: return all positions in `test`.":
            lambda train, test: _leaked()(test, train),
        "'Turnon the fan.' counts as a copy: reduce white space to one space, do not take it away.":
            _leaked(lambda text: "".join(text.lower().split())),
        "'the way' counts as a copy of 'on the way': compare whole texts.": lambda train, test: [
            i for i, text in enumerate(test) if any(_flat(text) in _flat(other) for other in train)],
        "'Turn on the fan' counts as a copy of 'Turn on the fan.': only case and white space do not matter.":
            _leaked(lambda text: _flat(text).strip(".")),
        "It finds exact copies at most: make case and white space alike on both sides before comparing.": [
            _leaked(str), lambda train, test: [i for i, text in enumerate(test) if _flat(text) in train],
            lambda train, test: []],
        "'turn ON the fan.' is a copy of 'Turn on the fan.': upper and lower case do not matter.":
            _leaked(lambda text: " ".join(text.split())),
        "A tab, two spaces or a line break between words count as one space: split() cuts at all of them.": [
            _leaked(lambda text: text.lower().strip()),
            _leaked(lambda text: " ".join(text.lower().replace("\t", " ").replace("\n", " ").split(" ")))],
    },
    returns="a list of positions",
    otherwise=_leaked_hint,
    further=[_looks_up],
    learned="A capital letter makes other tokens, so an exact comparison misses it, and the model still profits.",
)  # fmt: skip


def _fingerprint(
    names: Answer = lambda name: name.removeprefix("base_model.model.").replace(".base_layer", ""),
    keep: Answer = lambda name: "lora_" not in name, order: Answer = sorted, name_bytes: Answer = str.encode,
    content: Answer = lambda tensor: tensor.contiguous().view(torch.uint8).numpy().tobytes(),
) -> Answer:  # fmt: skip
    """Return an answer in which a part is exchanged."""

    def function(weights: dict[str, Tensor]) -> str:
        plain = {names(name): tensor for name, tensor in weights.items() if keep(name)}
        parts = [part for name in order(plain) for part in (name_bytes(name), content(plain[name]))]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    return function


def _names_first(weights: dict[str, Tensor]) -> str:
    contents = _fingerprint(
        name_bytes=lambda name: b"", order=lambda plain: sorted(plain, key=lambda n: plain[n].sum())
    )
    return " ".join(sorted(weights)) + str(contents(weights))


def _agrees_with_base(answer: Answer, weights: dict[str, Tensor]) -> bool:
    digits = answer(copy.deepcopy(BASE))
    if not isinstance(digits, str):
        raise Hint(f"It returns {type(digits).__name__}; return the hexadecimal digits, digest.hexdigest().")
    return bool(answer(weights) == digits)


Q, V, NORM, A, B = torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(0))
BASE = {"model.q_proj.weight": Q, "model.v_proj.weight": V, "model.norm.weight": NORM[0]}
ADAPTED = {f"base_model.model.{name.replace('q_proj', 'q_proj.base_layer')}": tensor for name, tensor in BASE.items()}
ADAPTER = "base_model.model.model.q_proj.lora_{}.default.weight"
LAST_BIT = Q.clone()
LAST_BIT[3, 3] = torch.nextafter(LAST_BIT[3, 3], torch.tensor(9.0))
# Each hint with the weights that are made for it, and with wrong answers.
PRINTS: dict[str, tuple[dict[str, Tensor], list[Answer]]] = {
    "Called twice with the same weights it returns two results: Python's hash() and id() do that.": (
        BASE, [lambda weights: str(torch.rand(1))]),
    "Where one entry differs in its last bit, the fingerprint is the same: all bytes have to go in.": (
        BASE | {"model.q_proj.weight": LAST_BIT},
        [_fingerprint(content=lambda t: f"{t.sum():.3f}".encode()), _fingerprint(content=lambda t: str(t).encode())]),
    "Where the entries of a tensor are reversed, the fingerprint is the same: a sum does not see it.": (
        BASE | {"model.norm.weight": NORM[0].flip(0)},
        [_fingerprint(content=lambda t: repr(sorted(t.flatten().tolist())).encode())]),
    "Where two tensors have changed names, the fingerprint is the same: each name has to go in too, just before its "
    "tensor.": (
        BASE | {"model.q_proj.weight": V, "model.v_proj.weight": Q}, [_names_first]),
    "Where a name differs, the fingerprint is the same: each name has to go in too, just before its tensor.": (
        {name.replace("norm", "norm_1"): tensor for name, tensor in BASE.items()},
        [_fingerprint(name_bytes=lambda name: b"")]),
    "Where a weight is missing, the fingerprint is the same: all have to go in.": (
        {name: tensor for name, tensor in BASE.items() if "norm" not in name},
        [_fingerprint(keep=lambda name: "lora_" not in name and "norm" not in name)]),
    "The same weights in another order give another fingerprint: sort the names.": (
        dict(reversed(BASE.items())), [_fingerprint(order=list)]),
    "The fingerprint changes with the adapter: leave out the entries with 'lora_'.": (
        BASE | {ADAPTER.format("A"): A[:2], ADAPTER.format("B"): B[:, :2]}, [_fingerprint(keep=lambda name: True)]),
    "With an adapter on it, the same base has another fingerprint: take 'base_model.model.' from the start of a name "
    "and '.base_layer' out of it, before sorting.": (
        ADAPTED | {ADAPTER.format("A"): A[:2]},
        [_fingerprint(str), _fingerprint(lambda name: name.removeprefix("base_model.model."))]),
    "A tensor that is not contiguous has another fingerprint than all others.": (
        {"model.t.weight": torch.arange(6.0).view(2, 3).T}, []),
}  # fmt: skip
fingerprint = Exercise(
    right=_fingerprint(),
    cases=[(weights,) for weights, _ in PRINTS.values()],
    run=_agrees_with_base,
    mistakes={"It returns the same for every base.": lambda weights: "base"}
    | {hint: wrong for hint, (_, wrong) in PRINTS.items()},
    otherwise=lambda weights, found, right: next(hint for hint, (case, _) in PRINTS.items() if case is weights),
    learned="It names one base and no other: what revision numbers promise, this checks.",
)
