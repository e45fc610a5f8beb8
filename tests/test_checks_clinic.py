"""The checks of notebook 10: the solution passes, the stub does not, and each mistake gets its hint."""

import hashlib
import math
from functools import partial

from helpers.checks import clinic as checks

import torch
from exercises import exercise_functions, exercise_tests, said

STUBS, SOLUTIONS = exercise_functions("10_debugging_clinic")
_said = partial(said, checks)


# triage(log)


def _triage(
    keep=lambda entry: "loss" in entry,
    dead=lambda norm: not math.isfinite(norm),
    order=("dead", "zero", "flat"),
    zero=lambda losses: "no gradient" if any(losses) else "no labels",
    all_zero=lambda losses, norms: not any(norms),
    limit=0.95,
    flat=lambda first, second, limit: second > limit * first,
    split=lambda losses: (losses[: len(losses) // 2], losses[len(losses) // 2 :]),
    mean=lambda part: sum(part) / len(part),
):
    def function(log):
        entries = [entry for entry in log if keep(entry)]
        losses, norms = [entry["loss"] for entry in entries], [entry["grad_norm"] for entry in entries]
        first, second = (mean(part) for part in split(losses))
        for question in order:
            if question == "dead" and any(dead(norm) for norm in norms):
                return "diverged"
            if question == "zero" and all_zero(losses, norms):
                return zero(losses)
            if question == "flat" and flat(first, second, limit):
                return "not learning"
        return "healthy"

    return function


def _losses_only(log):
    losses = [entry["loss"] for entry in log if "loss" in entry]
    if not any(losses):
        return "no labels"
    if any(not math.isfinite(loss) for loss in losses):
        return "diverged"
    return "not learning" if losses[-1] > 0.95 * losses[0] else "healthy"


def _in_place(log):
    log[:] = [entry for entry in log if "loss" in entry]
    return SOLUTIONS["triage"](log)


def _middle_first(losses):
    half = (len(losses) + 1) // 2
    return losses[:half], losses[half:]


# leaked(train, test)


def _leaked(plain=lambda text: " ".join(text.lower().split()), result=lambda hits: hits):
    def function(train, test):
        seen = {plain(text) for text in train}
        return result([i for i, text in enumerate(test) if plain(text) in seen])

    return function


def _every_pair(train, test):
    return [
        i
        for i, text in enumerate(test)
        if any(" ".join(t.lower().split()) == " ".join(text.lower().split()) for t in train)
    ]


def _substring(train, test):
    plain = [" ".join(t.lower().split()) for t in train]
    return [i for i, text in enumerate(test) if any(" ".join(text.lower().split()) in t for t in plain)]


def _in_train(train, test):
    seen = {" ".join(text.lower().split()) for text in test}
    return [i for i, text in enumerate(train) if " ".join(text.lower().split()) in seen]


def _one_side(train, test):
    return [i for i, text in enumerate(test) if " ".join(text.lower().split()) in set(train)]


def _sorting(train, test):
    hits = SOLUTIONS["leaked"](train, test)
    test.sort()
    return hits


def _lower_by_hand(text):
    return " ".join(text.lower().replace("\t", " ").replace("\n", " ").split(" "))


# fingerprint(weights)


def _fingerprint(
    names=lambda name: name.removeprefix("base_model.model.").replace(".base_layer", ""),
    keep=lambda name: "lora_" not in name,
    order=sorted,
    name_bytes=lambda name: name.encode(),
    content=lambda tensor: tensor.contiguous().view(torch.uint8).numpy().tobytes(),
    result=lambda digest: digest.hexdigest(),
):
    def function(weights):
        plain = {names(name): tensor for name, tensor in weights.items() if keep(name)}
        digest = hashlib.sha256()
        for name in order(plain):
            digest.update(name_bytes(name))
            digest.update(content(plain[name]))
        return result(digest)

    return function


def _names_first(weights):
    plain = {
        n.removeprefix("base_model.model.").replace(".base_layer", ""): t
        for n, t in weights.items()
        if "lora_" not in n
    }
    parts = [name.encode() for name in sorted(plain)]
    parts += sorted(t.contiguous().view(torch.uint8).numpy().tobytes() for t in plain.values())
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _first_weight(weights):
    name = min(name for name in weights if "lora_" not in name)
    return hashlib.sha256(weights[name].contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _popping(weights):
    for name in [name for name in weights if "lora_" in name]:
        weights.pop(name)
    return SOLUTIONS["fingerprint"](weights)


def _zeroing(weights):
    digits = SOLUTIONS["fingerprint"](weights)
    for name, tensor in weights.items():
        if "lora_" in name:
            tensor.zero_()
    return digits


WRONG = [
    ("triage", lambda log: "healthy", "It says 'healthy' of every log"),
    ("triage", lambda log: None, "It returns None; return one of"),
    ("triage", lambda log: "Diverged", "It returns 'Diverged'; return one of"),
    ("triage", lambda log: SOLUTIONS["triage"](log) == "healthy", "; return one of 'diverged'"),
    ("triage", _triage(keep=lambda entry: True), "An entry of an evaluation has no 'loss'"),
    ("triage", _triage(keep=lambda entry: "loss" in entry or "eval_loss" in entry), "has no 'loss': take only"),
    ("triage", _losses_only, "ask for that first, and of the gradient norms"),
    ("triage", _triage(order=("zero", "flat", "dead")), "compare the halves last"),
    ("triage", _triage(order=("flat", "dead", "zero")), "compare the halves last"),
    ("triage", _triage(order=("flat", "zero")), "ask for that first"),
    ("triage", _triage(zero=lambda losses: "no labels"), "there are labels: look at both"),
    ("triage", _triage(order=("zero", "dead"), all_zero=lambda losses, norms: not any(losses)), "ask for that first"),
    ("triage", _triage(dead=math.isnan), "A gradient norm of inf is no number either"),
    ("triage", _triage(zero=lambda losses: "no gradient"), "which it is, the losses say"),
    ("triage", _triage(all_zero=lambda losses, norms: 0 in norms), "One batch without labels is no verdict"),
    ("triage", _triage(limit=1.0), "The limit is 0.95"),
    ("triage", _triage(limit=0.9), "The limit is 0.95"),
    ("triage", _triage(flat=lambda a, b, limit: abs(a - b) < 0.05 * a), "A loss that rises is not learning either"),
    ("triage", _triage(split=_middle_first), "Of five entries the first two are the first half"),
    ("triage", _triage(order=("dead", "flat", "zero")), "compare the halves last"),
    ("triage", _in_place, "It changes the log"),
    ("leaked", lambda train, test: None, "It returns NoneType"),
    ("leaked", _leaked(result=set), "It returns set"),
    ("leaked", lambda train, test: [test[i] for i in SOLUTIONS["leaked"](train, test)], "It returns texts"),
    ("leaked", lambda train, test: [i in SOLUTIONS["leaked"](train, test) for i in range(len(test))], "True and False"),
    ("leaked", lambda train, test: [i for i in range(9) if i not in (0, 1, 2, 7, 8)], "that are not in train"),
    ("leaked", _leaked(result=lambda hits: hits[::-1]), "in rising order"),
    ("leaked", _in_train, "positions in `train`"),
    ("leaked", _leaked(plain=lambda text: "".join(text.lower().split())), "do not take it away"),
    ("leaked", _leaked(plain=lambda text: " ".join(text.lower().split()).strip(".")), "only case and white space"),
    ("leaked", _substring, "compare whole texts"),
    ("leaked", _leaked(plain=lambda text: text), "It finds exact copies at most"),
    ("leaked", _one_side, "It finds exact copies at most"),
    ("leaked", _leaked(plain=lambda text: " ".join(text.split())), "upper and lower case do not matter"),
    ("leaked", _leaked(plain=lambda text: text.lower().strip()), "split() cuts at all of them"),
    ("leaked", _leaked(plain=_lower_by_hand), "split() cuts at all of them"),
    ("leaked", _every_pair, "convert each text once"),
    ("leaked", _sorting, "It changes the lists"),
    ("fingerprint", lambda weights: None, "It returns NoneType"),
    ("fingerprint", _fingerprint(result=lambda digest: digest.digest()), "It returns bytes"),
    ("fingerprint", lambda weights: str(torch.rand(1)), "returns two results"),
    ("fingerprint", lambda weights: "base", "It returns the same for every base"),
    ("fingerprint", _fingerprint(content=lambda t: f"{t.sum():.3f}".encode()), "one entry differs in its last bit"),
    ("fingerprint", _fingerprint(content=lambda t: str(t).encode()), "one entry differs in its last bit"),
    ("fingerprint", _fingerprint(content=lambda t: repr(sorted(t.flatten().tolist())).encode()), "are reversed"),
    ("fingerprint", _fingerprint(name_bytes=lambda name: b""), "a name differs"),
    ("fingerprint", _names_first, "two tensors have changed names"),
    ("fingerprint", _first_weight, "the fingerprint is the same"),
    ("fingerprint", _fingerprint(order=list), "sort the names"),
    ("fingerprint", _fingerprint(keep=lambda name: True), "leave out the entries with 'lora_'"),
    ("fingerprint", _fingerprint(names=lambda name: name), "the same base has another fingerprint"),
    ("fingerprint", _fingerprint(names=lambda name: name.removeprefix("base_model.model.")), "'.base_layer' out of it"),
    (
        "fingerprint",
        _fingerprint(content=lambda t: t.view(torch.uint8).numpy().tobytes()),
        "your function raised RuntimeError",
    ),
    ("fingerprint", _popping, "It changes the weights"),
    ("fingerprint", _zeroing, "It changes the weights"),
]  # fmt: skip


test_the_solution_passes_and_the_stub_does_not, test_a_mistake_gets_its_hint = exercise_tests(
    checks, STUBS, SOLUTIONS, WRONG
)


def test_other_right_answers_pass(capsys):
    assert ": correct." in _said(capsys, "triage", _triage())
    assert ": correct." in _said(capsys, "leaked", _leaked())
    assert ": correct." in _said(capsys, "leaked", _leaked(plain=lambda text: tuple(text.casefold().split())))
    assert ": correct." in _said(capsys, "fingerprint", _fingerprint())
    raw = _fingerprint(
        content=lambda t: t.contiguous().numpy().tobytes(), order=lambda plain: sorted(plain, reverse=True)
    )
    assert ": correct." in _said(capsys, "fingerprint", raw)


def test_an_error_in_the_answer_is_reported_and_not_raised(capsys):
    assert "your function raised ZeroDivisionError" in _said(capsys, "triage", lambda log: 1 // 0)
    assert "your function raised TypeError" in _said(capsys, "triage", lambda log: log["loss"])
