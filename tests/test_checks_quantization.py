"""The checks of notebook 07: the solution passes, the stub does not, and each mistake gets its hint."""

from functools import partial

from helpers.checks import quantization as checks

import torch
from exercises import exercise_functions, exercise_tests, said

STUBS, SOLUTIONS = exercise_functions("07_quantization")
_said = partial(said, checks)


# quantize_int8(x, block_size)


def _int8(
    blocks=lambda x, b: x.reshape(-1, b),
    absmax=lambda blocks: blocks.abs().amax(dim=1),
    rounded=torch.round,
    factor=127,
    to=torch.int8,
    result=lambda absmax: absmax,
    guard=True,
):
    def function(x, block_size):
        parts = blocks(x, block_size)
        largest = absmax(parts)
        divisor = torch.where(largest == 0, 1.0, largest) if guard else largest
        if divisor.ndim == 1:
            divisor = divisor[:, None]
        codes = rounded(factor * parts / divisor)
        return (codes.to(torch.int32).to(to) if to == torch.int8 else codes.to(to)), result(largest)

    return function


def _own_codes_one_absmax(x, block_size):
    codes, absmax = SOLUTIONS["quantize_int8"](x, block_size)
    return codes, absmax.max()


def _whole_absmax_codes(x, block_size):
    absmax = SOLUTIONS["quantize_int8"](x, block_size)[1]
    return torch.round(127 * x / x.abs().max()).to(torch.int8).view(-1, block_size), absmax


def _flat_codes(x, block_size):
    codes, absmax = SOLUTIONS["quantize_int8"](x, block_size)
    return codes.flatten(), absmax


def _in_place(x, block_size):
    absmax = x.view(-1, block_size).abs().amax(dim=1)
    x.view(-1, block_size).div_(torch.where(absmax == 0, 1.0, absmax)[:, None])
    return torch.round(127 * x).to(torch.int8).view(-1, block_size), absmax


def _zeros_become_one(x, block_size):
    absmax = SOLUTIONS["quantize_int8"](x, block_size)[1]
    absmax = torch.where(absmax == 0, 1.0, absmax)
    return torch.round(127 * x.view(-1, block_size) / absmax[:, None]).to(torch.int8), absmax


def _zeros_get_a_code(x, block_size):
    codes, absmax = SOLUTIONS["quantize_int8"](x, block_size)
    return torch.where((absmax == 0)[:, None], -128, codes.int()).to(torch.int8), absmax


def _one_code_off(x, block_size):
    codes, absmax = SOLUTIONS["quantize_int8"](x, block_size)
    codes[0, 0] += 1
    return codes, absmax


def _nothing(*arguments):
    return None


# nearest_code(values, codebook)


def _middle(codebook):
    return (codebook[:-1] + codebook[1:]) / 2


def _by_levels(values, codebook):
    return torch.bucketize(values, codebook)


def _level_below(values, codebook):
    return torch.bucketize(values, codebook, right=True) - 1


def _one_high(values, codebook):
    return torch.bucketize(values, _middle(codebook)) + 1


def _one_low(values, codebook):
    return torch.bucketize(values, _middle(codebook)) - 1


def _midpoints_above(values, codebook):
    return len(codebook) - 1 - torch.bucketize(values, _middle(codebook))


def _evenly(values, codebook):
    return torch.round((values + 1) * (len(codebook) - 1) / 2).long()


def _half_difference(values, codebook):
    return torch.bucketize(values, (codebook[1:] - codebook[:-1]) / 2)


def _sum_of_neighbours(values, codebook):
    return torch.bucketize(values, codebook[1:] + codebook[:-1])


def _farthest(values, codebook):
    return (values[..., None] - codebook).abs().argmax(dim=-1)


def _signed(values, codebook):
    return (values[..., None] - codebook).argmin(dim=-1)


def _level_itself(values, codebook):
    return codebook[torch.bucketize(values, _middle(codebook))]


def _float_codes(values, codebook):
    return torch.bucketize(values, _middle(codebook)).float()


def _flat(values, codebook):
    return torch.bucketize(values, _middle(codebook)).flatten()


def _nf4_only(values, codebook):
    from helpers.quantization import nf4_codebook

    return torch.bucketize(values, _middle(nf4_codebook()))


# bits_double_quantized(block_size, nested_block_size)


BITS = [
    (lambda b, n: 4 + 32 / b, "without double quantization"),
    (lambda b, n: 4 + 8 / b, "in common is missing"),
    (lambda b, n: 8 / b + 32 / (b * n), "the scales' share alone"),
    (lambda b, n: 4 + 8 / b + 32 / n, "and each scale block_size weights"),
    (lambda b, n: 4 + 40 / b, "divide its 32 bits by that too"),
    (lambda b, n: 4 + 32 / b + 8 / (b * n), "swapped places"),
    (lambda b, n: 4 + 32 / b + 32 / (b * n), "A scale takes 8 bits, not 32"),
    (lambda b, n: 4 + 8 / b + 8 / (b * n), "32 bits, not 8"),
    (lambda b, n: 4 + 8 / b + 16 / (b * n), "32 bits, not 16"),
    (lambda b, n: 4 + 8 / n + 32 / (b * n), "its 8 bits are divided by block_size"),
    (lambda b, n: 4 * b + 8 + 32 / n, "the size of a block"),
    (lambda b, n: (4 + 8 / b + 32 / (b * n)) / 8, "This is in bytes"),
    (lambda b, n: 8 + 8 / b + 32 / (b * n), "takes 4 bits, not 8"),
    (lambda b, n: 5, "For blocks of 64 and 256 it is 4.127, and it says 5.000"),
    (lambda b, n: torch.tensor(4.0), "It returns Tensor; return a number"),
    (lambda b, n: None, "It returns NoneType"),
]


# pack(codes)


def _pack(join=lambda first, second: first << 4 | second, fill=7):
    def function(codes):
        padded = torch.cat([codes, codes.new_full((len(codes) % 2,), fill)])
        return join(padded[::2], padded[1::2])

    return function


def _halves(codes):
    padded = torch.cat([codes, codes.new_full((len(codes) % 2,), 7)])
    half = len(padded) // 2
    return padded[:half] << 4 | padded[half:]


def _drop_last(codes):
    even = codes[: len(codes) // 2 * 2]
    return even[::2] << 4 | even[1::2]


def _column(codes):
    return SOLUTIONS["pack"](codes)[:, None]


def _long(codes):
    return SOLUTIONS["pack"](codes).long()


def _in_place_shift(codes):
    codes[::2] <<= 4
    if len(codes) % 2:
        codes = torch.cat([codes, codes.new_tensor([7])])
    return codes[::2] | codes[1::2]


WRONG = [
    ("quantize_int8", _int8(absmax=lambda b: b.abs().max()), "one absmax for the whole tensor"),
    ("quantize_int8", _own_codes_one_absmax, "one absmax for the whole tensor"),
    ("quantize_int8", _whole_absmax_codes, "scaled by the absmax of the whole tensor"),
    ("quantize_int8", _int8(absmax=lambda b: b.amax(dim=1)), "take absolute values first"),
    ("quantize_int8", _int8(blocks=lambda x, b: x.reshape(b, -1).T), "not consecutive"),
    ("quantize_int8", _int8(blocks=lambda x, b: x.reshape(b, -1)), "one row for each block"),
    ("quantize_int8", _int8(result=lambda a: a / 127), "the step between levels"),
    ("quantize_int8", _int8(result=lambda a: 127 / a), "It returns 127 / absmax"),
    ("quantize_int8", _int8(result=lambda a: a + 1), "The absmax of the first block should be"),
    ("quantize_int8", _int8(rounded=torch.trunc), "round first"),
    ("quantize_int8", _int8(rounded=torch.floor), "It rounds down"),
    ("quantize_int8", _int8(factor=1), "127 is missing"),
    ("quantize_int8", _int8(factor=1, rounded=torch.trunc), "127 is missing"),
    ("quantize_int8", _int8(factor=128), "wraps around to -128"),
    ("quantize_int8", _int8(to=torch.float32), "The codes are torch.float32"),
    ("quantize_int8", _int8(to=torch.uint8), "The codes are torch.uint8"),
    ("quantize_int8", _int8(absmax=lambda b: b.abs().amax(dim=1, keepdim=True)), "Keep the dimension only for"),
    ("quantize_int8", _flat_codes, "the codes have the shape (48,), expected (12, 4)"),
    ("quantize_int8", _in_place, "changes x in place"),
    ("quantize_int8", _zeros_become_one, "block of zeros is 0, and it says 1"),
    ("quantize_int8", _zeros_get_a_code, "The codes of a block of zeros are 0, and the first is -128"),
    ("quantize_int8", _int8(guard=False), "0 / 0 is NaN"),
    ("quantize_int8", _int8(guard=False, rounded=lambda x: x.nan_to_num().round()), "0 / 0 is NaN"),
    ("quantize_int8", _int8(factor=7), "It multiplies by 7"),
    ("quantize_int8", _one_code_off, "Codes that are off: 1 of 48"),
    ("quantize_int8", lambda x, b: SOLUTIONS["quantize_int8"](x, b)[0], "It returns Tensor; return two tensors"),
    ("quantize_int8", _nothing, "It returns NoneType"),
    ("nearest_code", _by_levels, "the next level above"),
    ("nearest_code", _level_below, "the next level below"),
    ("nearest_code", _one_high, "one too high"),
    ("nearest_code", _one_low, "one too low"),
    ("nearest_code", _midpoints_above, "counts the midpoints above"),
    ("nearest_code", _evenly, "evenly spaced"),
    ("nearest_code", _half_difference, "half the difference"),
    ("nearest_code", _sum_of_neighbours, "this is the sum"),
    ("nearest_code", _farthest, "argmin, not argmax"),
    ("nearest_code", _signed, "The distance has no sign"),
    ("nearest_code", _level_itself, "Return its index"),
    ("nearest_code", _float_codes, "an index is an integer"),
    ("nearest_code", _flat, "it returns (400,): one code for each"),
    ("nearest_code", _nf4_only, "-0.899 is nearest to level 1 of [-1.0, -0.8"),
    ("nearest_code", _nothing, "It returns NoneType"),
    *(("bits_double_quantized", function, hint) for function, hint in BITS),
    ("pack", _pack(lambda a, b: b << 4 | a), "The order is reversed"),
    ("pack", _halves, "It pairs the two halves"),
    ("pack", _pack(lambda a, b: a << 4 + b), "`a << 4 + b` is `a << (4 + b)`"),
    ("pack", _pack(lambda a, b: a << 4 & b), "`&` keeps the bits that both have"),
    ("pack", _pack(lambda a, b: a << 8 | b), "It shifts by 8"),
    ("pack", _pack(lambda a, b: a * 4 + b), "It multiplies by 4"),
    ("pack", _pack(lambda a, b: a * 10 + b), "It multiplies by 10"),
    ("pack", _pack(lambda a, b: a | b), "The first code is not shifted"),
    ("pack", _pack(lambda a, b: a + b), "The first code is not shifted"),
    ("pack", _pack(fill=0), "A missing partner is 7"),
    ("pack", _pack(fill=15), "The codes [3, 7] make the byte 55, and it says 63"),
    ("pack", lambda codes: codes[::2] << 4 | codes[1::2], "the last has no partner"),
    ("pack", _drop_last, "The code that is left over is lost"),
    ("pack", _column, "its shape is (5, 1)"),
    ("pack", _long, "It returns torch.int64"),
    ("pack", _in_place_shift, "changes the codes in place"),
    ("pack", _nothing, "It returns NoneType"),
]


test_the_solution_passes_and_the_stub_does_not, test_a_mistake_gets_its_hint = exercise_tests(
    checks, STUBS, SOLUTIONS, WRONG
)


def test_other_right_answers_pass(capsys):
    def all_distances(values, codebook):
        return (values[..., None] - codebook).abs().argmin(dim=-1).to(torch.int32)

    def ties_go_up(values, codebook):
        return torch.searchsorted(_middle(codebook), values, right=True)

    for function in (all_distances, ties_go_up):
        assert ": correct." in _said(capsys, "nearest_code", function)
    assert ": correct." in _said(capsys, "quantize_int8", _int8(rounded=lambda x: torch.floor(x + 0.5)))
    by_product = _pack(lambda first, second: first * 16 + second)
    assert ": correct." in _said(capsys, "pack", by_product)
    by_blocks = lambda b, n: (4 * b * n + 8 * n + 32) / (b * n)  # noqa: E731
    assert ": correct." in _said(capsys, "bits_double_quantized", by_blocks)


def test_an_error_in_the_answer_is_reported_and_not_raised(capsys):
    assert "your function raised ZeroDivisionError" in _said(capsys, "pack", lambda codes: 1 // 0)
