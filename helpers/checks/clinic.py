"""The checks of notebook 10_debugging_clinic."""

from __future__ import annotations

import copy
from collections.abc import Callable

from helpers.checks.base import Hint, check

import torch

NAN, INFINITY = float("nan"), float("inf")
VERDICTS = ("diverged", "no labels", "no gradient", "not learning", "healthy")


def _log(losses: list[float], norms: list[float]) -> list[dict[str, float]]:
    return [{"step": i + 1, "loss": loss, "grad_norm": norm} for i, (loss, norm) in enumerate(zip(losses, norms))]  # noqa: B905


def triage(answer: Callable[[list[dict[str, float]]], str]) -> None:
    """Check `triage(log)`: one of five words, with what is asked first asked first."""

    def test() -> None:
        falling, ones = [3.6, 2.9, 1.8, 1.2], [3.0, 2.0, 1.0, 0.5]
        ends = [{"step": 4, "eval_loss": 1.1}, {"step": 4, "train_loss": 2.2, "train_runtime": 1.0}]
        cases = [
            ("healthy", _log(falling, ones), "the loss falls"),
            ("diverged", _log([3.6, 8.6, 0.0, 0.0], [3.5, NAN, NAN, NAN]), "losses end at 0.0, gradient norms are NaN"),
            ("diverged", _log(falling, [3.0, 2.0, 1.0, INFINITY]), "the last gradient norm is inf"),
            ("diverged", _log([0.0] * 4, [NAN] * 4), "all losses are 0.0 and all gradient norms NaN"),
            ("no labels", _log([0.0] * 4, [0.0] * 4), "all losses and all gradient norms are 0"),
            ("no gradient", _log([1.1, 1.0, 1.1, 1.0], [0.0] * 4), "all gradient norms are 0, and the losses are not"),
            ("no gradient", _log([3.0, 2.0, 1.0, 1.0], [0.0] * 4), "all gradient norms are 0, and the losses fall"),
            ("not learning", _log([3.6, 3.5, 3.5, 3.6], ones), "the loss is flat"),
            ("not learning", _log([2.0, 2.2, 4.5, 6.0], ones), "the loss rises"),
            ("not learning", _log([1.0, 1.0, 0.96, 0.96], ones), "the second half is 0.96 times the first"),
            ("healthy", _log([1.0, 1.0, 0.94, 0.94], ones), "the second half is 0.94 times the first"),
            ("healthy", _log([1.0, 1.0, 0.1, 1.0, 1.0], [1.0] * 5), "there are five entries, the middle one low"),
            ("healthy", _log([2.0, 0.0, 0.5, 0.4], [1.0, 0.0, 1.0, 1.0]), "one loss and its gradient norm are 0"),
            ("healthy", ends[:1] + _log(falling, ones) + ends, "there are entries of an evaluation and of the end"),
            (
                "diverged",
                _log([3.6, 3.6, 8.6, 0.0], [3.0, 3.0, NAN, NAN]),
                "a loss jumps, and the norms are NaN from then",
            ),
        ]
        results = []
        for right, log, words in cases:
            given = copy.deepcopy(log)
            try:
                results.append(answer(given))
            except (KeyError, TypeError) as error:
                if right == "healthy" and "entries of" in words and isinstance(error, KeyError):
                    raise Hint(
                        f"An entry of an evaluation has no {error}: take only the entries with a 'loss'."
                    ) from None
                raise
            if given != log and repr(given) != repr(log):
                raise Hint("It changes the log that it is given: read it only.")
        if strange := [result for result in results if result not in VERDICTS]:
            raise Hint(f"It returns {strange[0]!r}; return one of {', '.join(map(repr, VERDICTS))}.")
        wrong = {
            words: (right, result) for (right, _, words), result in zip(cases, results, strict=True) if right != result
        }
        if not wrong:
            return
        if len(set(results)) == 1:
            raise Hint(f"It says {results[0]!r} of every log.")
        if "not learning" in (results[5], results[14]) and {"diverged", "no gradient"} <= set(results):
            raise Hint(
                "A run that is dead or without a gradient may have a flat loss as well: compare the halves last."
            )
        if living := [cases[i][2] for i in (1, 3, 14) if results[i] != "diverged"]:
            raise Hint(
                f"Where {living[0]}, the run has diverged: ask for that first, and of the gradient norms, since the "
                "Trainer leaves a loss that is NaN out of its log."
            )
        if results[2] != "diverged":
            raise Hint("A gradient norm of inf is no number either: math.isfinite is False for both.")
        if results[4] == "no gradient" and results[5] == "no gradient":
            raise Hint("All gradient norms are 0 in two of the cases: which it is, the losses say.")
        if results[12] != "healthy":
            raise Hint("One batch without labels is no verdict on the run: all losses have to be 0, and all norms.")
        if results[5] == "no labels":
            raise Hint("Where gradient norms are 0 and the losses are not, there are labels: look at both.")
        if results[9] == "healthy" or results[10] == "not learning":
            raise Hint("The limit is 0.95 times the mean of the first half: 0.96 is 'not learning', 0.94 is 'healthy'.")
        if results[8] == "healthy":
            raise Hint("A loss that rises is not learning either: compare without taking the absolute value.")
        if results[11] != "healthy":
            raise Hint(
                "Of five entries the first two are the first half, and the mean of each half is over its own entries."
            )
        words, (right, result) = next(iter(wrong.items()))
        raise Hint(f"Where {words}, it should say {right!r}, and it says {result!r}.")

    check(answer, test, "A dead run logs a loss of 0, so the gradient is asked first.")


def leaked(answer: Callable[[list[str], list[str]], list[int]]) -> None:
    """Check `leaked(train, test)`: positions in test, up to case and white space, in linear time."""

    def test() -> None:
        train = ["Turn on the fan.", "Set the oven\tto 200.", "  Lamp off ", "Straße frei", "on the way"]
        tests = [
            "turn ON the fan.",
            "Set  the oven to\n200.",
            "lamp off",
            "Turn off the fan.",
            "Turnon the fan.",
            "the way",
        ]
        tests += ["Turn on the fan", "LAMP\u00a0OFF\n", "Lamp off"]
        right = [0, 1, 2, 7, 8]
        given = list(train), list(tests)
        result = answer(*given)
        if given != (train, tests):
            raise Hint("It changes the lists that it is given: make new ones.")
        if isinstance(result, set | tuple | dict) or not isinstance(result, list):
            raise Hint(f"It returns {type(result).__name__}; return a list of positions.")
        if any(isinstance(item, str) for item in result):
            raise Hint("It returns texts; return their positions in `test`.")
        if any(isinstance(item, bool) for item in result):
            raise Hint("It returns True and False; return the positions in `test`.")
        if result == [position for position in range(len(tests)) if position not in right]:
            raise Hint("These are the positions of the texts that are not in train.")
        if result != sorted(set(result)):
            raise Hint("Each position once, and in rising order.")
        if result == [0, 1, 2]:
            raise Hint("These are positions in `train`, or copies are left out: return all positions in `test`.")
        if 4 in result:
            raise Hint("'Turnon the fan.' counts as a copy: reduce white space to one space, do not take it away.")
        if 5 in result:
            raise Hint("'the way' counts as a copy of 'on the way': compare whole texts.")
        if 6 in result:
            raise Hint(
                "'Turn on the fan' counts as a copy of 'Turn on the fan.': only case and white space do not matter."
            )
        if not result or result == [8]:
            raise Hint("It finds exact copies at most: make case and white space alike on both sides before comparing.")
        if 0 not in result:
            raise Hint("'turn ON the fan.' is a copy of 'Turn on the fan.': upper and lower case do not matter.")
        if 1 not in result:
            raise Hint(
                "A tab, two spaces or a line break between words count as one space: split() cuts at all of them."
            )
        if missing := [tests[position] for position in right if position not in result]:
            raise Hint(f"{missing[0]!r} is a copy too: white space at the ends does not matter, of any kind.")
        if extra := [tests[position] for position in result if position not in right]:
            raise Hint(f"{extra[0]!r} is not in train.")
        calls = [0]

        class Counted(str):
            __slots__ = ()

            def lower(self) -> str:
                calls[0] += 1
                return str(self).lower()

            casefold = lower

        many: list[str] = [Counted(f"text {i}") for i in range(60)]
        answer(many, [Counted(f"other {i}") for i in range(60)])
        if calls[0] > 600:
            raise Hint(
                f"For 60 and 60 texts it converts {calls[0]} times: convert each text once, and look it up in a set."
            )

    check(
        answer,
        test,
        "A capital letter makes other tokens, so an exact comparison misses it, and the model still profits.",
    )


def fingerprint(answer: Callable[[dict[str, torch.Tensor]], str]) -> None:
    """Check `fingerprint(weights)`: of the base alone, by names and bytes, in no particular order."""

    def test() -> None:
        generator = torch.Generator().manual_seed(0)
        q, v, norm = (torch.randn(*shape, generator=generator) for shape in ((4, 4), (4, 4), (4,)))
        base = {"model.q_proj.weight": q, "model.v_proj.weight": v, "model.norm.weight": norm}
        adapted = {
            "base_model.model.model.q_proj.base_layer.weight": q,
            "base_model.model.model.q_proj.lora_A.default.weight": torch.randn(2, 4, generator=generator),
            "base_model.model.model.q_proj.lora_B.default.weight": torch.randn(4, 2, generator=generator),
            "base_model.model.model.v_proj.weight": v,
            "base_model.model.model.norm.weight": norm,
        }
        trained = {name: tensor + ("lora_" in name) for name, tensor in adapted.items()}
        before = {name: tensor.clone() for name, tensor in adapted.items()}
        result = answer(dict(base))
        if not isinstance(result, str):
            raise Hint(f"It returns {type(result).__name__}; return the hexadecimal digits, digest.hexdigest().")
        if answer(dict(base)) != result:
            raise Hint("Called twice with the same weights it returns two results: Python's hash() and id() do that.")
        last_bit = q.clone()
        last_bit[3, 3] = torch.nextafter(last_bit[3, 3], torch.tensor(9.0))
        swapped = {"model.q_proj.weight": v, "model.v_proj.weight": q}
        names_in = "each name has to go in too, just before its tensor"
        others = [
            ("one entry differs in its last bit", base | {"model.q_proj.weight": last_bit}, "all bytes have to go in"),
            (
                "the entries of a tensor are reversed",
                base | {"model.norm.weight": norm.flip(0)},
                "a sum does not see it",
            ),
            ("two tensors have changed names", base | swapped, names_in),
            ("a name differs", {name.replace("norm", "norm_1"): p for name, p in base.items()}, names_in),
            ("a weight is missing", {name: p for name, p in base.items() if "norm" not in name}, "all have to go in"),
        ]
        if len({answer(dict(weights)) for _, weights, _ in others} | {result}) == 1:
            raise Hint("It returns the same for every base.")
        for words, weights, why in others:
            if answer(dict(weights)) == result:
                raise Hint(f"Where {words}, the fingerprint is the same: {why}.")
        if answer(dict(reversed(base.items()))) != result:
            raise Hint("The same weights in another order give another fingerprint: sort the names.")
        if answer(dict(adapted)) != answer(dict(trained)):
            raise Hint("The fingerprint changes when the adapter is trained: leave out the entries with 'lora_'.")
        if answer(dict(adapted)) != result:
            raise Hint(
                "With an adapter on it, the same base has another fingerprint: take 'base_model.model.' from the start "
                "of a name and '.base_layer' out of it, before sorting."
            )
        given = dict(adapted)
        answer(given)
        if given.keys() != adapted.keys() or any(not torch.equal(given[name], before[name]) for name in before):
            raise Hint("It changes the weights that it is given: read them only.")
        answer({"model.t.weight": torch.arange(6.0).view(2, 3).T})  # not contiguous

    check(answer, test, "It names one base and no other: what revision numbers promise, this checks.")
