"""The exercises of notebook 07: the right answers and the likely wrong ones, each with its hint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from helpers.checks.base import Answer, Exercise, Hint

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Two = tuple[Tensor, Tensor]


class _NoNaN(TorchFunctionMode):
    """Under it a NaN is noticed where it arises; as an int8 it may become 0, depending on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            with torch._C.DisableTorchFunction():
                if torch.isnan(result).any():
                    raise Hint("0 / 0 is NaN in a block of zeros: divide by 1 where the absmax is 0.")
        return result


def _without_nan(answer: Answer, x: Tensor, block_size: int) -> Any:
    with _NoNaN():
        return answer(x, block_size)


def _int8(
    absmax: Callable[[Tensor], Tensor] = lambda blocks: blocks.abs().amax(dim=1),
    rounded: Callable[[Tensor], Tensor] = torch.round,
    factor: int = 127,
    dtype: torch.dtype = torch.int8,
    blocks: Callable[[Tensor, int], Tensor] = lambda x, block_size: x.reshape(-1, block_size),
    result: Callable[[Tensor], Tensor] = lambda absmax: absmax,
) -> Answer:
    """Return a quantize_int8 with these steps; `result` is of the absmax that it returns."""

    def answer(x: Tensor, block_size: int) -> Two:
        parts = blocks(x, block_size)
        largest = absmax(parts)
        divisor = torch.where(largest == 0, 1.0, largest)
        codes = rounded(factor * parts / (divisor[:, None] if divisor.ndim == 1 else divisor))
        return codes.to(torch.int32).to(dtype), result(largest)

    return answer


def _scaled_by_all(x: Tensor, block_size: int) -> Two:
    return torch.round(127 * x / x.abs().max()).to(torch.int8).view(-1, block_size), _int8()(x, block_size)[1]


def _off(x: Tensor, block_size: int, found: Two, right: Two) -> str:
    if not torch.allclose(found[1], right[1]):
        first = int(torch.isclose(found[1], right[1]).int().argmin())
        if right[1][first] == 0:
            return f"The absmax of a block of zeros is 0, and it says {found[1][first]:g}."
        what = "first block" if first == 0 else f"block {first}"
        return f"The absmax of the {what} should be {right[1][first]:.2f}, and it is {found[1][first]:.2f}."
    wrong = found[0] != right[0]
    i, j = wrong.nonzero()[0].tolist()
    if right[1][i] == 0:
        return f"The codes of a block of zeros are 0, and the first is {int(found[0][i, j])}."
    return (
        f"{x.view(-1, block_size)[i, j]:.3f} in a block with the absmax {right[1][i]:.3f} has the code "
        f"{int(right[0][i, j])}, and it says {int(found[0][i, j])}. Codes that are off: {int(wrong.sum())} of "
        f"{wrong.numel()}."
    )


_x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 5, 0.1, 2, 30, 0.5])[:, None]
_x[1, 2] = -40.0  # so that in some block the largest value is not the largest absolute value

quantize_int8 = Exercise(
    right=_int8(),
    # A block of 12 runs on from one row into the next. The last case has a block of zeros.
    cases=[(_x, 4), (_x, 12), (torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 0.0, -3.0, 0.5]), 4)],
    run=_without_nan,
    mistakes={
        "The codes are torch.float32: convert them with .to(torch.int8) after rounding.": _int8(dtype=torch.float32),
        "It has one absmax for the whole tensor: take the largest of each row of blocks, dim=1.":
            [_int8(lambda blocks: blocks.abs().max()), _int8(result=lambda absmax: absmax.max())],
        "absmax has one number for each block: keep the dimension only for the division.":
            _int8(lambda blocks: blocks.abs().amax(dim=1, keepdim=True)),
        "The absmax is the largest value: take absolute values first.": _int8(lambda blocks: blocks.amax(dim=1)),
        "It returns absmax / 127, the step between levels. Return the absmax itself.":
            _int8(result=lambda absmax: absmax / 127),
        "It returns 127 / absmax. Return the absmax itself.": _int8(result=lambda absmax: 127 / absmax),
        "The blocks are not consecutive: reshape(-1, block_size) has a block in each row, and reshape(block_size, -1) "
        "has not.": _int8(blocks=lambda x, block_size: x.reshape(block_size, -1).T),
        "It cuts off the fraction: .to(torch.int8) rounds towards zero, so round first.": _int8(rounded=torch.trunc),
        "It rounds down: torch.round goes to the nearest whole number.": _int8(rounded=torch.floor),
        "It multiplies by 7, the largest 4-bit code. With 8 bits it is 127.": _int8(factor=7),
        "127 is missing: the codes run from -127 to 127.": [_int8(factor=1), _int8(factor=1, rounded=torch.trunc)],
        "The codes are scaled by the absmax of the whole tensor: divide each block by its own.": _scaled_by_all,
        "It multiplies by 128. 128 does not fit into int8 and wraps around to -128; 127 is the largest.":
            _int8(factor=128),
    },
    returns="two tensors, the codes (int8, one row for each block) and the absmax (one number for each block)",
    otherwise=_off,
    learned="One scale for each block, and each code within half a step of its weight.",
)  # fmt: skip


def _middle(codebook: Tensor) -> Tensor:
    return (codebook[1:] + codebook[:-1]) / 2


def _any_integer(answer: Answer, values: Tensor, codebook: Tensor) -> Any:
    result = answer(values, codebook)
    whole = isinstance(result, Tensor) and not result.is_floating_point() and result.dtype != torch.bool
    return result.long() if whole else result


def _farther(values: Tensor, codebook: Tensor, found: Tensor, right: Tensor) -> str:
    i = tuple((found != right).nonzero()[0].tolist())
    levels = [round(level, 2) for level in codebook.tolist()]
    return f"{values[i]:.3f} is nearest to level {int(right[i])} of {levels}, and it says {int(found[i])}."


_values = torch.cat([torch.linspace(-1, 1, 398), torch.tensor([0.999, -0.999])]).reshape(4, 100)
_uneven = torch.tensor([-1.0, -0.8, -0.35, -0.1, 0.0, 0.05, 0.3, 0.9, 1.0])  # no value lies on a midpoint of these

nearest_code = Exercise(
    right=lambda values, codebook: (values[..., None] - codebook).abs().argmin(dim=-1),
    cases=[(_values, _uneven), (_values, torch.tensor([-1.0, -0.2, 0.7, 1.0]))],
    run=_any_integer,
    mistakes={
        "It returns the nearest level. Return its index: the level is codebook[index].":
            lambda values, codebook: codebook[torch.bucketize(values, _middle(codebook))],
        "It counts the levels below a value, so it takes the next level above, near or not. Count the midpoints "
        "between levels.": torch.bucketize,
        "It takes the next level below, near or not. Count the midpoints between levels.":
            lambda values, codebook: torch.bucketize(values, codebook, right=True) - 1,
        "It is one too high: a value below the first midpoint has the code 0.":
            lambda values, codebook: torch.bucketize(values, _middle(codebook)) + 1,
        "It is one too low: a value below the first midpoint has the code 0.":
            lambda values, codebook: torch.bucketize(values, _middle(codebook)) - 1,
        "It counts the midpoints above the value: count those below.":
            lambda values, codebook: len(codebook) - 1 - torch.bucketize(values, _middle(codebook)),
        "It takes the levels for evenly spaced. Use the codebook as it is given.":
            lambda values, codebook: ((values + 1) * (len(codebook) - 1) / 2).round().long(),
        "It takes half the difference of neighbouring levels; a midpoint is half their sum.":
            lambda values, codebook: torch.bucketize(values, (codebook[1:] - codebook[:-1]) / 2),
        "A midpoint is half the sum of two neighbouring levels; this is the sum.":
            lambda values, codebook: torch.bucketize(values, codebook[1:] + codebook[:-1]),
        "It takes the farthest level: argmin, not argmax.":
            lambda values, codebook: (values[..., None] - codebook).abs().argmax(dim=-1),
        "The distance has no sign: take the absolute value before argmin.":
            lambda values, codebook: (values[..., None] - codebook).argmin(dim=-1),
    },
    returns="one code for each value, an integer, since it is an index",
    otherwise=_farther,
    learned="Midpoints as borders give the same, without a comparison with every level.",
)  # fmt: skip

bits_double_quantized = Exercise(
    right=lambda block_size, nested_block_size: 4 + 8 / block_size + 32 / (block_size * nested_block_size),
    cases=[(64, 256), (32, 128), (128, 512)],
    mistakes={
        "This is NF4 without double quantization: a scale takes 8 bits now.": lambda b, n: 4 + 32 / b,
        "The float32 that nested_block_size scales have in common is missing.": lambda b, n: 4 + 8 / b,
        "This is the scales' share alone: the code of a weight takes 4 bits.": lambda b, n: 8 / b + 32 / (b * n),
        "A float32 serves nested_block_size scales, and each scale block_size weights.": lambda b, n: (
            4 + 8 / b + 32 / n
        ),
        "The float32 is shared by nested_block_size scales: divide its 32 bits by that too.": lambda b, n: 4 + 40 / b,
        "32 and 8 have swapped places: the scale of a block is in 8 bits.": lambda b, n: 4 + 32 / b + 8 / (b * n),
        "A scale takes 8 bits, not 32: that is what double quantization is for.": lambda b, n: (
            4 + 32 / b + 32 / (b * n)
        ),
        "The outer scale is a float32: 32 bits, not 8.": lambda b, n: 4 + 8 / b + 8 / (b * n),
        "The outer scale is a float32: 32 bits, not 16.": lambda b, n: 4 + 8 / b + 16 / (b * n),
        "block_size weights share a scale: its 8 bits are divided by block_size.": lambda b, n: (
            4 + 8 / n + 32 / (b * n)
        ),
        "This is the size of a block. Divide it by the block_size weights in it.": lambda b, n: 4 * b + 8 + 32 / n,
        "This is in bytes; return bits.": lambda b, n: (4 + 8 / b + 32 / (b * n)) / 8,
        "The code of a weight takes 4 bits, not 8.": lambda b, n: 8 + 8 / b + 32 / (b * n),
    },
    returns="a number of bits",
    otherwise=lambda b, n, found, right: f"For blocks of {b} and {n} it is {right:.3f}, and it says {found:.3f}.",
    learned="Blocks of 64 and 256 take 4.127 bits, 0.373 less than one float32 for each block.",
)


def _pack(
    join: Callable[[Tensor, Tensor], Tensor] = lambda first, second: first << 4 | second, fill: int = 7
) -> Answer:
    def answer(codes: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(codes, (0, len(codes) % 2), value=fill)
        return join(padded[::2], padded[1::2])

    return answer


def _halves(codes: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(codes, (0, len(codes) % 2), value=7)
    return padded[: len(padded) // 2] << 4 | padded[len(padded) // 2 :]


def _other_byte(codes: Tensor, found: Tensor, right: Tensor) -> str:
    if found.shape != right.shape:
        return f"{len(codes)} codes make {len(right)} bytes, and its shape is {tuple(found.shape)}."
    i = int((found != right).int().argmax())
    pair = [*codes.tolist(), 7][2 * i : 2 * i + 2]
    return f"The codes {pair} make the byte {int(right[i])}, and it says {int(found[i])}."


_codes = torch.tensor([1, 2, 15, 0, 9, 15, 3, 8, 12, 4], dtype=torch.uint8)

pack = Exercise(
    right=_pack(),
    cases=[(_codes,), (_codes[:7],), (_codes[:1],)],
    mistakes={
        "With an odd number of codes the last has no partner: append a 7 first.":
            lambda codes: codes[::2] << 4 | codes[1::2],
        "The code that is left over is lost: it gets a byte too, with 7 in its low bits.":
            lambda codes: _pack()(codes[: len(codes) // 2 * 2]),
        "The order is reversed: the first of two codes belongs into the high bits.": _pack(lambda a, b: b << 4 | a),
        "It pairs the two halves. A byte holds two neighbours.": _halves,
        "Python adds before it shifts: `a << 4 + b` is `a << (4 + b)`. Use `a << 4 | b`.": _pack(
            lambda a, b: a << 4 + b
        ),
        "`&` keeps the bits that both have; `|` joins them.": _pack(lambda a, b: a << 4 & b),
        "It shifts by 8, out of the byte: a code has 4 bits.": _pack(lambda a, b: a << 8 | b),
        "It multiplies by 4; to shift by 4 bits is to multiply by 2 ** 4 = 16.": _pack(lambda a, b: a * 4 + b),
        "It multiplies by 10; a code has 4 bits, so the factor is 2 ** 4 = 16.": _pack(lambda a, b: a * 10 + b),
        "The first code is not shifted: `<< 4` moves it into the high bits.":
            [_pack(lambda a, b: a | b), _pack(lambda a, b: a + b)],
        "A missing partner is 7, the code of zero; code 0 stands for -1.": _pack(fill=0),
    },
    returns="one byte (torch.uint8) for each pair of codes",
    otherwise=_other_byte,
    learned="Half a byte for each weight, in the order that bitsandbytes stores them.",
)  # fmt: skip
