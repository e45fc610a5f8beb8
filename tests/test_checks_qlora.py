"""The checks of notebook 08: the solution passes, the stub does not, and each mistake gets its hint."""

import math

from helpers.checks import qlora as checks

import torch
from exercises import exercise_functions, exercise_tests, said

STUBS, SOLUTIONS = exercise_functions("08_qlora")
NF4 = 4.127 / 8


def _bytes(linear=NF4, other=4, adapter=10):
    """A training_bytes with a price per weight for each of the three."""
    return lambda n, m, k: n * linear + m * other + k * adapter


# smallest_rank(shapes, elements)


def _smallest_side(shapes):
    return min(min(shape) for shape in shapes)


def _floor(shapes, elements):
    return elements // _smallest_side(shapes)


def _fraction(shapes, elements):
    return elements / _smallest_side(shapes)


def _more_than(shapes, elements):
    return elements // _smallest_side(shapes) + 1


def _only_a(shapes, elements):
    return math.ceil(elements / min(d_in for _, d_in in shapes))


def _only_b(shapes, elements):
    return math.ceil(elements / min(d_out for d_out, _ in shapes))


def _largest(shapes, elements):
    return math.ceil(elements / max(max(shape) for shape in shapes))


def _both_together(shapes, elements):
    return max(math.ceil(elements / (d_out + d_in)) for d_out, d_in in shapes)


def _twice(shapes, elements):
    return 2 * math.ceil(elements / _smallest_side(shapes))


# first_bad_step(log_history)


def _first(is_bad, value=lambda entries, i: entries[i]["step"]):
    def first_bad_step(log_history):
        return next((value(log_history, i) for i, entry in enumerate(log_history) if is_bad(entry)), None)

    return first_bad_step


def _loss(entry):
    return entry.get("loss", 1.0)


def _norm(entry):
    return entry.get("grad_norm", 1.0)


def _bad(entry):
    return not (math.isfinite(_loss(entry)) and math.isfinite(_norm(entry)))


def _last_bad(log_history):
    return next((entry["step"] for entry in reversed(log_history) if _bad(entry)), None)


# merge_error(weight, A, B, scaling, to_nf4)


def _norms(difference, reference):
    return (difference.norm() / reference.norm()).item()


def _error_with(delta):
    def merge_error(weight, A, B, scaling, to_nf4):
        change = delta(A, B, scaling)
        return _norms(to_nf4(weight + change) - weight - change, change)

    return merge_error


def _change_alone(w, a, b, s, q):
    return _norms(q(s * b @ a) - s * b @ a, s * b @ a)


def _of_the_sum(w, a, b, s, q):
    return _norms(q(w + s * b @ a) - w - s * b @ a, w + s * b @ a)


def _of_the_base(w, a, b, s, q):
    return _norms(q(w + s * b @ a) - w - s * b @ a, w)


def _against_the_base(w, a, b, s, q):
    return _norms(q(w + s * b @ a) - w, s * b @ a)


def _against_a_rounded_change(w, a, b, s, q):
    return _norms(q(w + s * b @ a) - w - q(s * b @ a), s * b @ a)


def _squared(w, a, b, s, q):
    return SOLUTIONS["merge_error"](w, a, b, s, q) ** 2


def _absolute(w, a, b, s, q):
    return (q(w + s * b @ a) - w - s * b @ a).norm()


def _not_rounded(w, a, b, s, q):
    merged = w + s * b @ a
    return _norms(merged - merged, s * b @ a)


def _matrix(w, a, b, s, q):
    return q(w + s * b @ a) - w - s * b @ a


def _transposed(w, a, b, s, q):
    return _norms(q(w + s * a @ b) - w - s * a @ b, s * a @ b)


def _nothing(*arguments):
    return None


WRONG = [
    ("training_bytes", _bytes(linear=4.127), "counts bits and not bytes"),
    ("training_bytes", _bytes(linear=4.5 / 8), "without double quantization"),
    ("training_bytes", _bytes(linear=0.5), "leaves out the scales"),
    ("training_bytes", _bytes(other=2), "float32 after prepare_model_for_kbit_training"),
    ("training_bytes", _bytes(other=NF4), "Embeddings and norms are not quantized"),
    ("training_bytes", _bytes(other=0), "leaves out the unquantized weights"),
    ("training_bytes", _bytes(adapter=6), "leaves out the adapter's gradient"),
    ("training_bytes", _bytes(adapter=8), "leaves out the optimizer's state"),
    ("training_bytes", _bytes(adapter=4), "counts the adapter's weights only"),
    ("training_bytes", _bytes(adapter=9), "keeps two moments"),
    ("training_bytes", _bytes(adapter=16), "two moments in float32"),
    ("training_bytes", _bytes(linear=NF4 + 4, other=8), "frozen base has no gradient."),
    ("training_bytes", _bytes(linear=NF4 + 2, other=6), "frozen base has no optimizer state"),
    ("training_bytes", _bytes(linear=NF4 + 6, other=10), "no gradient and no optimizer state"),
    ("training_bytes", _bytes(linear=4), "it should be 191 million bytes, and it is 560"),
    ("training_bytes", _nothing, "returns None"),
    ("training_bytes", lambda n, m, k: f"{_bytes()(n, m, k):.0f} bytes", "returns str; return one number"),
    ("smallest_rank", _floor, "It rounds down"),
    ("smallest_rank", _fraction, "a rank is a whole number"),
    ("smallest_rank", _more_than, "exactly that many is large enough"),
    ("smallest_rank", _only_a, "looks at A"),
    ("smallest_rank", _only_b, "looks at B"),
    ("smallest_rank", _largest, "the smallest decides"),
    ("smallest_rank", _both_together, "state of their own"),
    ("smallest_rank", _twice, "4,096 elements it should be 22, and it is 44"),
    ("smallest_rank", _nothing, "returns None"),
    ("first_bad_step", _nothing, "finds nothing, or returns nothing"),
    ("first_bad_step", _first(lambda e: _norm(e) == math.nan), "NaN equals nothing"),
    ("first_bad_step", _first(lambda e: _loss(e) == 0.0 or _bad(e)), "A loss of 0.0 alone is no proof"),
    ("first_bad_step", _first(lambda e: not math.isfinite(_loss(e))), "which the filter has mended"),
    ("first_bad_step", _first(lambda e: math.isnan(_loss(e)) or math.isnan(_norm(e))), "misses infinity"),
    ("first_bad_step", _first(lambda e: not math.isfinite(_norm(e))), "the gradient norm only"),
    ("first_bad_step", _first(lambda e: math.isnan(_norm(e))), "for NaN in the gradient norm only"),
    ("first_bad_step", _first(lambda e: not math.isfinite(e["loss"])), "entry.get"),
    ("first_bad_step", _first(_bad, lambda entries, i: i), "the position in the list"),
    ("first_bad_step", _first(_bad, lambda entries, i: entries[i - 1]["step"]), "last good step"),
    ("first_bad_step", _last_bad, "last bad step"),
    ("first_bad_step", _first(_bad, lambda entries, i: str(entries[i]["step"])), "an int, or None"),
    ("first_bad_step", _first(_bad, lambda entries, i: entries[i]["step"] + 1), "it should be 3, and it is 4"),
    ("merge_error", _error_with(lambda a, b, s: b @ a), "leaves out the scaling"),
    ("merge_error", _error_with(lambda a, b, s: b @ a / s), "divides by the scaling"),
    ("merge_error", _change_alone, "rounds the change alone"),
    ("merge_error", _of_the_sum, "against the whole weight"),
    ("merge_error", _of_the_base, "against the base weight"),
    ("merge_error", _against_the_base, "compares the rounded weight with the base"),
    ("merge_error", _against_a_rounded_change, "rounded by itself"),
    ("merge_error", _squared, "the square of the norms' ratio"),
    ("merge_error", _absolute, "It is not relative"),
    ("merge_error", _not_rounded, "finds no error at all"),
    ("merge_error", _error_with(lambda a, b, s: 2 * s * b @ a), "On our weight it should be"),
    ("merge_error", _matrix, "returns Tensor; return one number"),
    ("merge_error", _nothing, "returns None"),
]


def _said(capsys, name, function):
    return said(checks, capsys, name, function)


test_the_solution_passes_and_the_stub_does_not, test_a_mistake_gets_its_hint = exercise_tests(
    checks, STUBS, SOLUTIONS, WRONG
)


def test_other_right_answers_pass(capsys):
    """A tensor for a number, the exact bits, and inputs that are changed in place."""

    def in_place(weight, A, B, scaling, to_nf4):
        change = B.mul_(scaling) @ A
        rounded = to_nf4(weight.add_(change))
        return (rounded - weight).norm() / change.norm()

    def popping(log_history):
        while log_history:
            entry = log_history.pop(0)
            if _bad(entry):
                return entry["step"]
        return None

    assert ": correct." in _said(capsys, "merge_error", in_place)
    assert ": correct." in _said(capsys, "first_bad_step", popping)
    exact = _bytes(linear=0.5 + 1 / 64 + 4 / (64 * 256), adapter=8 + 2 * (1 + 4 / 256))
    assert ": correct." in _said(capsys, "training_bytes", exact)
    assert ": correct." in _said(capsys, "training_bytes", lambda n, m, k: torch.tensor(_bytes()(n, m, k)))


def test_an_error_in_the_answer_is_reported_and_not_raised(capsys):
    assert "your function raised RuntimeError" in _said(capsys, "merge_error", _transposed)
