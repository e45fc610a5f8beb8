"""The checks of notebook 07_quantization.

Each compares the answer with the right one and with what the likely mistakes give, on values so uneven that no two of
them agree by chance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from helpers.checks.base import Hint, check, compare

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def quantize_int8(answer: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> None:
    """Check `quantize_int8(x, block_size)`: round(127 x / absmax) with the absmax of each block of the flattened x."""

    def test() -> None:
        x = _random(6, 8) * torch.tensor([1.0, 5, 0.1, 2, 30, 0.5])[:, None]
        x[1, 2] = -40.0  # so that in some block the largest value is not the largest absolute value
        for block_size in (4, 12):  # a block of 12 runs on from one row into the next
            given = x.clone()
            codes, absmax = _two_tensors(answer(given, block_size))
            if not torch.equal(given, x):
                raise Hint("It changes x in place: work on a copy.")
            blocks = x.view(-1, block_size)
            right_absmax = blocks.abs().amax(dim=1)
            if codes.dtype != torch.int8:
                raise Hint(f"The codes are {codes.dtype}: convert them with .to(torch.int8) after rounding.")
            if codes.shape != blocks.shape:
                raise Hint(
                    f"For {tuple(x.shape)} in blocks of {block_size} the codes have the shape {tuple(codes.shape)}, "
                    f"expected {tuple(blocks.shape)}: one row for each block."
                )
            absmax_mistakes = [
                (blocks.amax(dim=1), "The absmax is the largest value: take absolute values first."),
                (right_absmax / 127, "It returns absmax / 127, the step between levels. Return the absmax itself."),
                (127 / right_absmax, "It returns 127 / absmax. Return the absmax itself."),
                (
                    _columns(x, block_size).abs().amax(dim=1),
                    "The blocks are not consecutive: reshape(-1, block_size) has a block in each row, and "
                    "reshape(block_size, -1) has not.",
                ),
            ]
            if absmax.shape != right_absmax.shape:
                if absmax.numel() == 1:
                    raise Hint("It has one absmax for the whole tensor: take the largest of each row of blocks, dim=1.")
                raise Hint(
                    f"absmax has the shape {tuple(absmax.shape)}, expected {tuple(right_absmax.shape)}: one number for "
                    "each block. Keep the dimension only for the division."
                )
            otherwise = f"The absmax of the first block should be {right_absmax[0]:.2f}, and it is {absmax[0]:.2f}."
            compare(absmax, right_absmax, absmax_mistakes, otherwise)
            scaled = 127 * blocks / right_absmax[:, None]
            code_mistakes = [
                (scaled.trunc(), "It cuts off the fraction: .to(torch.int8) rounds towards zero, so round first."),
                (scaled.floor(), "It rounds down: torch.round goes to the nearest whole number."),
                ((scaled / 127 * 7).round(), "It multiplies by 7, the largest 4-bit code. With 8 bits it is 127."),
                ((scaled / 127).round(), "127 is missing: the codes run from -127 to 127."),
                ((scaled / 127).trunc(), "127 is missing: the codes run from -127 to 127."),
                (
                    (127 * blocks / x.abs().max()).round(),
                    "The codes are scaled by the absmax of the whole tensor: divide each block by its own.",
                ),
                (
                    (scaled / 127 * 128).round().to(torch.int32).to(torch.int8).float(),
                    "It multiplies by 128. 128 does not fit into int8 and wraps around to -128; 127 is the largest.",
                ),
            ]
            wrong = codes.float() != scaled.round()
            i, j = divmod(int(wrong.int().argmax()), block_size)
            otherwise = (
                f"{blocks[i, j]:.3f} in a block with the absmax {right_absmax[i]:.3f} has the code "
                f"{int(scaled[i, j].round())}, and it says {int(codes[i, j])}. "
                f"Codes that are off: {int(wrong.sum())} of {codes.numel()}."
            )
            compare(codes, scaled.round(), code_mistakes, otherwise)
        _block_of_zeros(answer)

    check(answer, test, "One scale for each block, and each code within half a step of its weight.")


def _block_of_zeros(answer: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> None:
    with _NoNaN():
        codes, absmax = _two_tensors(answer(torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 0.0, -2.0, 0.5]), 4))
    if not torch.isfinite(absmax).all() or absmax[0] != 0:
        raise Hint(f"The absmax of a block of zeros is 0, and it says {absmax[0]:g}.")
    if codes[0].any():
        raise Hint(f"The codes of a block of zeros are 0, and the first is {int(codes[0, 0])}.")


class _NoNaN(TorchFunctionMode):
    """Under it a NaN is noticed where it arises; as an int8 it may become 0, depending on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            with torch._C.DisableTorchFunction():
                if torch.isnan(result).any():
                    raise Hint("0 / 0 is NaN in a block of zeros: divide by 1 where the absmax is 0.")
        return result


def nearest_code(answer: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Check `nearest_code(values, codebook)`: the index of the nearest level, by the midpoints."""

    def test() -> None:
        uneven = torch.tensor([-1.0, -0.8, -0.35, -0.1, 0.0, 0.05, 0.3, 0.9, 1.0])
        for codebook in (uneven, torch.tensor([-1.0, -0.2, 0.7, 1.0])):
            values = torch.cat([torch.linspace(-1, 1, 398), torch.tensor([0.999, -0.999])]).reshape(4, 100)
            right = (values[..., None] - codebook).abs().argmin(dim=-1)
            last = len(codebook) - 1
            result = answer(values.clone(), codebook.clone())
            if not isinstance(result, Tensor):
                raise Hint(f"It returns {type(result).__name__}; return a tensor of codes.")
            if result.shape != values.shape:
                raise Hint(
                    f"For values of shape {tuple(values.shape)} it returns {tuple(result.shape)}: one code for each."
                )
            midpoints = (codebook[1:] + codebook[:-1]) / 2
            if torch.allclose(result.double(), codebook[right].double()):
                raise Hint("It returns the nearest level. Return its index: the level is codebook[index].")
            if result.is_floating_point() or result.dtype == torch.bool:
                raise Hint(f"The codes are {result.dtype}: an index is an integer.")
            mistakes = [
                (
                    torch.bucketize(values, codebook),
                    "It counts the levels below a value, so it takes the next level above, near or not. Count the "
                    "midpoints between levels.",
                ),
                (
                    torch.bucketize(values, codebook, right=True) - 1,
                    "It takes the next level below, near or not. Count the midpoints between levels.",
                ),
                (right + 1, "It is one too high: a value below the first midpoint has the code 0."),
                (right - 1, "It is one too low: a value below the first midpoint has the code 0."),
                (last - right, "It counts the midpoints above the value: count those below."),
                (
                    ((values + 1) * last / 2).round(),
                    "It takes the levels for evenly spaced. Use the codebook as it is given.",
                ),
                (
                    torch.bucketize(values, (codebook[1:] - codebook[:-1]) / 2),
                    "It takes half the difference of neighbouring levels; a midpoint is half their sum.",
                ),
                (
                    torch.bucketize(values, codebook[1:] + codebook[:-1]),
                    "A midpoint is half the sum of two neighbouring levels; this is the sum.",
                ),
                (
                    (values[..., None] - codebook).abs().argmax(dim=-1),
                    "It takes the farthest level: argmin, not argmax.",
                ),
                (
                    (values[..., None] - codebook).argmin(dim=-1),
                    "The distance has no sign: take the absolute value before argmin.",
                ),
            ]
            first = int((result != right).flatten().int().argmax())
            otherwise = (
                f"{values.flatten()[first]:.3f} is nearest to level {int(right.flatten()[first])} of "
                f"{[round(level, 2) for level in codebook.tolist()]}, and it says {int(result.flatten()[first])}."
            )
            wrong = (result != right) & (
                (values[..., None] - midpoints).abs().amin(dim=-1) > 1e-6
            )  # ties go either way
            if wrong.any():
                compare(result, right, mistakes, otherwise)

    check(answer, test, "Midpoints as borders give the same, without a comparison with every level.")


def bits_double_quantized(answer: Callable[[int, int], float]) -> None:
    """Check `bits_double_quantized(block_size, nested_block_size)`: 4 + 8/B + 32/(B * B2)."""

    def test() -> None:
        cases = [(64, 256), (32, 128), (128, 512)]
        results = [answer(*case) for case in cases]
        if any(isinstance(r, bool) or not isinstance(r, int | float) for r in results):
            raise Hint(f"It returns {type(results[0]).__name__}; return a number of bits.")
        result = torch.tensor(results, dtype=torch.float64)
        b, n = torch.tensor(cases, dtype=torch.float64).T
        right = 4 + 8 / b + 32 / (b * n)
        mistakes = [
            (4 + 32 / b, "This is NF4 without double quantization: a scale takes 8 bits now."),
            (4 + 8 / b, "The float32 that nested_block_size scales have in common is missing."),
            (right - 4, "This is the scales' share alone: the code of a weight takes 4 bits."),
            (4 + 8 / b + 32 / n, "A float32 serves nested_block_size scales, and each scale block_size weights."),
            (4 + 40 / b, "The float32 is shared by nested_block_size scales: divide its 32 bits by that too."),
            (4 + 32 / b + 8 / (b * n), "32 and 8 have swapped places: the scale of a block is in 8 bits."),
            (4 + 32 / b + 32 / (b * n), "A scale takes 8 bits, not 32: that is what double quantization is for."),
            (4 + 8 / b + 8 / (b * n), "The outer scale is a float32: 32 bits, not 8."),
            (4 + 8 / b + 16 / (b * n), "The outer scale is a float32: 32 bits, not 16."),
            (4 + 8 / n + 32 / (b * n), "block_size weights share a scale: its 8 bits are divided by block_size."),
            (4 * b + 8 + 32 / n, "This is the size of a block. Divide it by the block_size weights in it."),
            (right / 8, "This is in bytes; return bits."),
            (8 + 8 / b + 32 / (b * n), "The code of a weight takes 4 bits, not 8."),
        ]
        otherwise = f"For blocks of 64 and 256 it is {right[0]:.3f}, and it says {result[0]:.3f}."
        compare(result, right, mistakes, otherwise)

    check(answer, test, "Blocks of 64 and 256 take 4.127 bits, 0.373 less than one float32 for each block.")


def pack(answer: Callable[[Tensor], Tensor]) -> None:
    """Check `pack(codes)`: two codes to a byte, the first in the high bits, 7 in place of a missing second."""

    def test() -> None:
        even = torch.tensor([1, 2, 15, 0, 9, 15, 3, 8, 12, 4], dtype=torch.uint8)
        for codes in (even, even[:7], even[:1]):
            given = codes.clone()
            try:
                result = answer(given)
            except RuntimeError as error:
                if len(codes) % 2 == 0:
                    raise
                raise Hint("With an odd number of codes the last has no partner: append a 7 first.") from error
            if not isinstance(result, Tensor):
                raise Hint(f"It returns {type(result).__name__}; return a tensor of bytes.")
            if not torch.equal(given, codes):
                raise Hint("It changes the codes in place: shift a copy.")
            number = (len(codes) + 1) // 2
            if len(codes) % 2 and result.shape == (number - 1,):
                raise Hint("The code that is left over is lost: it gets a byte too, with 7 in its low bits.")
            if result.shape != (number,):
                raise Hint(f"{len(codes)} codes make {number} bytes, and its shape is {tuple(result.shape)}.")
            if result.dtype != torch.uint8:
                raise Hint(f"It returns {result.dtype}; a byte is torch.uint8.")
            padded = torch.cat([codes, codes.new_full((len(codes) % 2,), 7)])
            first, second = padded[::2], padded[1::2]
            right = first << 4 | second
            zero_padded = right.clone()
            zero_padded[-1] -= 7 * (len(codes) % 2)
            mistakes = [
                (second << 4 | first, "The order is reversed: the first of two codes belongs into the high bits."),
                (padded[:number] << 4 | padded[number:], "It pairs the two halves. A byte holds two neighbours."),
                (
                    first << 4 + second,
                    "Python adds before it shifts: `a << 4 + b` is `a << (4 + b)`. Use `a << 4 | b`.",
                ),
                (first << 4 & second, "`&` keeps the bits that both have; `|` joins them."),
                (first << 8 | second, "It shifts by 8, out of the byte: a code has 4 bits."),
                (first * 4 + second, "It multiplies by 4; to shift by 4 bits is to multiply by 2 ** 4 = 16."),
                (first * 10 + second, "It multiplies by 10; a code has 4 bits, so the factor is 2 ** 4 = 16."),
                (first | second, "The first code is not shifted: `<< 4` moves it into the high bits."),
                (first + second, "The first code is not shifted: `<< 4` moves it into the high bits."),
                (zero_padded, "A missing partner is 7, the code of zero; code 0 stands for -1."),
            ]
            i = int((result != right).int().argmax())
            pair = padded[2 * i : 2 * i + 2].tolist()
            otherwise = f"The codes {pair} make the byte {int(right[i])}, and it says {int(result[i])}."
            compare(result, right, mistakes, otherwise)

    check(answer, test, "Half a byte for each weight, in the order that bitsandbytes stores them.")


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _columns(x: Tensor, block_size: int) -> Tensor:
    return x.reshape(block_size, -1).T


def _two_tensors(result: object) -> tuple[Tensor, Tensor]:
    if not (isinstance(result, tuple) and len(result) == 2 and all(isinstance(part, Tensor) for part in result)):
        raise Hint(f"It returns {type(result).__name__}; return two tensors, the codes and the absmax.")
    return result
