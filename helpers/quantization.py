"""NF4 from scratch: the codebook, block-wise quantization, double quantization, and what they cost in bits.

It does what bitsandbytes does with `quantize_4bit(weight, blocksize, quant_type="nf4")` and
`dequantize_4bit`, and the tests hold it to that, bit for bit. NF4 is Dettmers et al. 2023 (QLoRA,
arXiv:2305.14314), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import torch
from bitsandbytes.functional import create_dynamic_map

# The quantiles start here, and not at 1, whose quantile is infinite: (29/30 + 31/32) / 2, the mean
# of one half step from the end with 15 and with 16 equal steps (Yoshida 2023, arXiv:2306.06965), to
# the 7 digits of bitsandbytes.
LAST_PROBABILITY = 0.9677083
# bitsandbytes treats a smaller largest value as this one, so that an all-zero block is not divided
# by zero.
SMALLEST_ABSMAX = 1e-38


@dataclass(frozen=True, eq=False)
class NF4Tensor:
    """A weight in NF4.

    Blocks are cut from the flattened weight, so they run on from one row into the next; the last
    one may be shorter.
    """

    codes: torch.Tensor  # (weights,) uint8: the index 0 to 15 into the codebook, of the flattened weight
    absmax: torch.Tensor  # (blocks,) float32: the largest absolute value of each block
    shape: torch.Size  # of the weight
    dtype: torch.dtype  # of the weight
    block_size: int  # weights in a block

    def packed(self) -> torch.Tensor:
        """Return the codes two to a byte, uint8 of shape (ceil(weights / 2), 1), as bitsandbytes stores them."""
        codes = torch.nn.functional.pad(self.codes, (0, len(self.codes) % 2), value=7)  # 7 is the code of zero
        return (codes[::2] << 4 | codes[1::2])[:, None]  # the first of two in the high four bits


@dataclass(frozen=True, eq=False)
class DoubleQuantized:
    """The absmax of a weight's blocks, quantized to 8 bits in blocks of their own."""

    codes: torch.Tensor  # (values,) uint8: the index into `bitsandbytes.functional.create_dynamic_map()`
    absmax: torch.Tensor  # (blocks,) float32: the largest absolute value of each block, less `offset`
    offset: torch.Tensor  # () float32: the mean of the values
    block_size: int  # values in a block


def nf4_codebook() -> torch.Tensor:
    """Return NF4's 16 values, float32, rising from -1 to 1, with an exact 0 at index 7.

    The construction is that of `bitsandbytes.functional.create_normal_map()`, and so are the
    roundings to float32: without them the values differ in the last digit.
    """
    quantile = NormalDist().inv_cdf  # of the standard normal distribution
    start = _as_float32(LAST_PROBABILITY)

    def positive(count: int) -> list[float]:
        # Probabilities in `count` equal steps from LAST_PROBABILITY down to 1/2, which itself
        # (quantile 0) is left out.
        return [quantile(_as_float32(start + (0.5 - start) * i / count)) for i in range(count)]

    # 7 below zero, mirrored and with wider steps; zero; 8 above.
    values = torch.tensor([-q for q in positive(7)] + [0.0] + positive(8)[::-1], dtype=torch.float32)
    return values / values.max()


def quantize_nf4(weight: torch.Tensor, block_size: int = 64) -> NF4Tensor:
    """Quantize to NF4: divide each block by its largest absolute value, and take the nearest value of the codebook.

    Args:
        weight: float32, bfloat16 or float16, of any shape, finite.
        block_size: weights in a block; bitsandbytes takes powers of two from 32 to 4096.
    """
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"weight is {weight.dtype}: NF4 takes float32, bfloat16 or float16; convert with .float()")
    codes, absmax = _quantize_blocks(weight, "weight", nf4_codebook(), block_size)
    return NF4Tensor(codes, absmax, weight.shape, weight.dtype, block_size)


def dequantize_nf4(q: NF4Tensor) -> torch.Tensor:
    """Return the weight that `q` stands for, codebook[code] * absmax, multiplied in float32 and rounded to its dtype.

    If its absmax is doubly quantized, pass `dataclasses.replace(q, absmax=double_dequantize(d))`.
    """
    return _dequantize_blocks(q.codes, q.absmax, nf4_codebook(), q.block_size).reshape(q.shape).to(q.dtype)


def double_quantize(absmax: torch.Tensor, block_size: int = 256) -> DoubleQuantized:
    """Quantize the absmax of a weight's blocks: subtract their mean, then 8 bits in blocks of 256 (QLoRA, section 3).

    As in `bitsandbytes.functional.quantize_4bit(compress_statistics=True)`, with one difference:
    here each value gets its nearest code. bitsandbytes' CPU kernel first rounds the value to one of
    65,536 evenly spaced ones and looks that up, so its code can differ close to a midpoint.

    Args:
        absmax: (values,) float32, such as `NF4Tensor.absmax`; at least one, all finite.
        block_size: values in a block.
    """
    if absmax.numel() == 0:
        raise ValueError("absmax is empty: there is nothing to quantize")
    offset = absmax.mean()  # all absmax are positive: less their mean, they use both signs of the code
    codes, nested = _quantize_blocks(absmax - offset, "absmax", create_dynamic_map(), block_size)
    return DoubleQuantized(codes, nested, offset, block_size)


def double_dequantize(d: DoubleQuantized) -> torch.Tensor:
    """Return the (values,) float32 that `d` stands for: the inverse of `double_quantize`, to rounding to 8 bits."""
    return _dequantize_blocks(d.codes, d.absmax, create_dynamic_map(), d.block_size) + d.offset


def bits_per_parameter(block_size: int = 64, double_quant: bool = False, nested_block_size: int = 256) -> float:
    """Return the bits that a weight takes in NF4: 4 for its code, and its share of the block's absmax.

    What is stored once for a whole tensor, such as the mean, is left out.
    """
    _check_block_size(block_size)
    _check_block_size(nested_block_size, "nested_block_size")
    # An absmax takes 32 bits; with double quantization 8, and its share of the 32 of its outer
    # block. QLoRA, section 3: 4 + 8/64 + 32/(64 * 256) = 4.127.
    absmax_bits = 8 + 32 / nested_block_size if double_quant else 32
    return 4 + absmax_bits / block_size


def _quantize_blocks(
    values: torch.Tensor, name: str, codebook: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes, (values,) uint8, and the largest absolute values, (blocks,) float32, of the flattened tensor.

    To the last bit as in bitsandbytes' reference kernels `quantize_4bit` and `quantize_blockwise`.
    """
    _check_block_size(block_size)
    flat = values.detach().reshape(-1).float()
    if not torch.isfinite(flat).all():
        raise ValueError(f"{name} holds NaN or inf, and one of them spoils its block; find out where it comes from")
    full = len(flat) // block_size * block_size
    blocks, tail = flat[:full].view(-1, block_size), flat[full:]  # (full blocks, block_size), (rest,)
    absmax = blocks.abs().amax(dim=1)
    # n_i = x_i / absmax in [-1, 1]. A full block is multiplied by 1 / absmax there, and a shorter
    # one divided.
    scaled = (blocks * (1 / absmax.clamp(min=SMALLEST_ABSMAX))[:, None]).flatten()
    if len(tail):
        tail_absmax = tail.abs().amax().clamp(min=SMALLEST_ABSMAX)
        absmax = torch.cat([absmax, tail_absmax[None]])
        scaled = torch.cat([scaled, tail / tail_absmax])
    codebook = codebook.to(flat.device)
    midpoints = (codebook[:-1] + codebook[1:]) / 2
    # The nearest value: c_i = the number of midpoints below n_i, so a tie goes down.
    return torch.bucketize(scaled, midpoints).to(torch.uint8), absmax


def _dequantize_blocks(
    codes: torch.Tensor, absmax: torch.Tensor, codebook: torch.Tensor, block_size: int
) -> torch.Tensor:
    scale = absmax.repeat_interleave(block_size)[: len(codes)]  # (values,): each block's absmax for its values
    return codebook.to(codes.device)[codes.long()] * scale


def _check_block_size(block_size: int, name: str = "block_size") -> None:
    if block_size < 1:
        raise ValueError(f"{name}={block_size}: a block holds at least one value; bitsandbytes' default is 64")


def _as_float32(number: float) -> float:
    return torch.tensor(number, dtype=torch.float32).item()
