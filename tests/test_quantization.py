"""helpers.quantization against bitsandbytes, which is the independent truth here, and against float64.

bitsandbytes' kernels `quantize_4bit` and `quantize_blockwise` are called through torch.ops where a block size is needed
that its functions refuse. It dequantizes flattened weights here: its CPU kernel for AVX-512 (0.50) takes wrong scales
for a matrix whose row length is a multiple of 16 and not of the block size.
"""

import dataclasses
import math

from helpers.quantization import (
    DoubleQuantized,
    bits_per_parameter,
    dequantize_nf4,
    double_dequantize,
    double_quantize,
    nf4_codebook,
    quantize_nf4,
)

import pytest
import torch
from bitsandbytes import functional as bnb
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODEBOOK = nf4_codebook()
MIDPOINTS = (CODEBOOK[:-1] + CODEBOOK[1:]) / 2


@pytest.fixture(autouse=True)
def _no_compiler():
    """bitsandbytes compiles what it dequantizes odd shapes with, anew for each shape."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def assert_same_as_bitsandbytes(weight, block_size):
    q = quantize_nf4(weight, block_size)
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit.default(weight, block_size, "nf4", torch.uint8)
    assert q.codes.shape == (weight.numel(),)
    assert q.codes.dtype == torch.uint8
    assert torch.equal(q.packed(), packed)
    assert q.packed().dtype == packed.dtype
    assert q.absmax.dtype == absmax.dtype
    assert torch.equal(q.absmax, absmax)
    restored = dequantize_nf4(q)
    assert (restored.shape, restored.dtype) == (weight.shape, weight.dtype)
    if block_size in (32, 64, 128, 4096) and weight.numel():  # the sizes that its functions take
        state = bnb.QuantState(absmax, torch.Size([weight.numel()]), blocksize=block_size, quant_type="nf4")
        state.dtype = weight.dtype
        theirs, ours = bnb.dequantize_4bit(packed, state).flatten(), restored.flatten()
        # A CPU that converts to bfloat16 in hardware makes the smallest numbers zero, below float32's normal range.
        flushed = (theirs == 0) & (ours.abs() < torch.finfo(torch.float32).tiny)
        assert torch.equal(theirs.masked_fill(flushed, 0), ours.masked_fill(flushed, 0))


# The codebook


def test_the_codebook_is_bitsandbytes_to_the_bit():
    assert CODEBOOK.dtype == torch.float32
    assert torch.equal(CODEBOOK, bnb.get_4bit_type("nf4", device="cpu"))


def test_the_codebook_in_float64():
    """Without the intermediate roundings: quantiles by the error function's inverse."""
    last = (29 / 30 + 31 / 32) / 2

    def quantile(p):
        return math.sqrt(2) * torch.erfinv(2 * torch.tensor(p, dtype=torch.float64) - 1)

    above = torch.stack([quantile(0.5 + (last - 0.5) * i / 8) for i in range(9)])
    below = torch.stack([-quantile(0.5 + (last - 0.5) * i / 7) for i in range(7, 0, -1)])
    values = torch.cat([below, above]) / above[-1]
    assert (values - CODEBOOK.double()).abs().max() < 2e-7
    assert CODEBOOK[[0, 7, 15]].tolist() == [-1, 0, 1]


def test_each_call_returns_a_codebook_of_its_own():
    nf4_codebook().zero_()
    assert torch.equal(nf4_codebook(), CODEBOOK)


# Quantizing and dequantizing


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 13), max_size=3) | st.lists(st.integers(30, 200), min_size=1, max_size=2),
    dtype=st.sampled_from(DTYPES),
    block_size=st.sampled_from([1, 2, 7, 32, 64, 128, 4096]),
    exponent=st.sampled_from([0, 0, -3, 4, -30, 30, -37, -38, -40, -45, 38]),
    zeros=st.sampled_from([0.0, 0.5, 0.98]),
    seed=st.integers(0, 5),
)
def test_equal_to_bitsandbytes(shape, dtype, block_size, exponent, zeros, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0**exponent
    weight = weight * (torch.rand(shape, generator=generator) >= zeros)
    largest = torch.finfo(dtype).max
    assert_same_as_bitsandbytes(weight.clamp(-largest, largest).to(dtype), block_size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_order_of_magnitude_in_one_weight(dtype):
    """From the smallest to the largest number of the dtype, in blocks that hold the extremes of both signs."""
    info = torch.finfo(dtype)
    numbers = [0.0, -0.0, info.tiny, -info.tiny, info.tiny / 4, -info.tiny / 4, info.eps, 1.0, -1.0, info.max, info.min]
    numbers += [sign * 2.0**e for e in range(-24, 16) for sign in (1, -1)]
    weight = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    assert_same_as_bitsandbytes(torch.cat([weight, weight.flip(0), weight[:50] / 3]), 64)
    assert_same_as_bitsandbytes(weight[:, None] * torch.linspace(-1, 1, 64).to(dtype), 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_gets_the_nearest_value(dtype):
    """All numbers of the dtype from -1 to 1, against a search in float64, where none of them is halfway."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.abs() <= 1]
    block = torch.cat([every, torch.ones(1, dtype=dtype)])
    distance = (block.double()[:, None] - CODEBOOK.double()).abs()
    codes = quantize_nf4(block, len(block)).codes
    assert torch.equal(codes.long(), distance.argmin(dim=1))
    smallest, second = distance.topk(2, dim=1, largest=False).values.T
    assert (smallest < second).all()
    assert_same_as_bitsandbytes(block[-4096:], 4096)


def test_a_tie_goes_to_the_lower_code():
    for i, midpoint in enumerate(MIDPOINTS):
        up, down = (torch.nextafter(midpoint, torch.tensor(end)) for end in (1.0, -1.0))
        block = torch.tensor([1.0, down, midpoint, up])
        assert quantize_nf4(block, 4).codes.tolist() == [15, i, i, i + 1]
    assert_same_as_bitsandbytes(torch.cat([torch.ones(49), MIDPOINTS]), 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_around_the_midpoints(dtype):
    """In full blocks and in a short last block, which bitsandbytes scales by division instead of a reciprocal."""
    for scale in (1.0, 0.7, 3e-4, 977.0):
        ends = torch.full((15, 2), 1.0)
        near = MIDPOINTS[:, None] * (1 + torch.arange(-15, 16) * torch.finfo(dtype).eps)
        weight = (torch.cat([ends, near], dim=1) * scale).to(dtype)  # (15, 33)
        assert_same_as_bitsandbytes(weight, 33)
        for row in weight:
            assert_same_as_bitsandbytes(row, 64)


def test_other_layouts_and_parameters():
    weight = torch.nn.Parameter(torch.randn(70, 30))
    before = weight.detach().clone()
    q = quantize_nf4(weight)
    assert not q.absmax.requires_grad
    assert not dequantize_nf4(q).requires_grad
    assert torch.equal(weight, before)
    assert torch.equal(quantize_nf4(weight.T).codes, quantize_nf4(weight.T.contiguous()).codes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 129])  # in a full block, and in the short one at the end
def test_nan_and_inf_raise(bad, dtype, place):
    weight = torch.ones(130, dtype=dtype)
    weight[place] = bad
    with pytest.raises(ValueError, match="weight holds NaN or inf"):
        quantize_nf4(weight)
    bnb.quantize_4bit(weight, quant_type="nf4")  # which does not raise, as notebook 07 says


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.bool])
def test_other_dtypes_raise(dtype):
    with pytest.raises(TypeError, match=r"NF4 takes float32, bfloat16 or float16; convert with \.float\(\)"):
        quantize_nf4(torch.ones(4, dtype=dtype))


def test_block_sizes_below_one_raise():
    for call in (
        lambda: quantize_nf4(torch.ones(4), 0),
        lambda: double_quantize(torch.ones(4), -1),
        lambda: bits_per_parameter(0),
        lambda: bits_per_parameter(64, True, 0),
    ):
        with pytest.raises(ValueError, match=r"block_size=(0|-1): a block holds at least one value"):
            call()


# Double quantization


@pytest.mark.parametrize("blocks", [1, 2, 255, 256, 257, 5120])
@pytest.mark.parametrize("spread", [0.0, 0.4, 1e4])
def test_double_quantization_follows_bitsandbytes(blocks, spread):
    weight = torch.randn(blocks, 64) * (1 + spread * torch.rand(blocks, 1))
    q = quantize_nf4(weight)
    _, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    d = double_quantize(q.absmax)
    assert d.codes.dtype == state.absmax.dtype == torch.uint8
    assert d.codes.shape == state.absmax.shape == (blocks,)
    assert torch.equal(d.offset, state.offset)
    torch.testing.assert_close(d.absmax, state.state2.absmax, rtol=0, atol=1e-37)  # 1e-38 or 0 where all are equal

    # The same codes stand for the same scales, to the bit.
    theirs = DoubleQuantized(state.absmax, state.state2.absmax, state.offset, state.state2.blocksize)
    assert torch.equal(double_dequantize(theirs), bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset)

    # With the scales rounded as the CPU kernel does it, every code is equal (seen for full blocks).
    if (scale := d.absmax.repeat_interleave(256)[:blocks]).min() > 1e-30 and blocks % 256 == 0:
        in_steps = torch.round(((q.absmax - d.offset) * (1 / scale) + 1) / 2 * 65535) / 65535 * 2 - 1
        codebook = bnb.create_dynamic_map()
        assert torch.equal(torch.bucketize(in_steps, (codebook[:-1] + codebook[1:]) / 2), state.absmax.long())

    # Our codes are the nearest. bitsandbytes' CPU kernel rounds to 65,536 values first, two roundings of half a step.
    levels = bnb.create_dynamic_map().double()
    scale = d.absmax.double().repeat_interleave(256)[:blocks]
    scaled = (q.absmax.double() - d.offset.double()) / scale.clamp(min=1e-30)
    best = (scaled[:, None] - levels).abs().amin(dim=1)
    assert ((scaled - levels[d.codes.long()]).abs() <= best + 1e-6).all()
    varied = scale > 1e-30
    assert ((scaled - levels[state.absmax.long()]).abs() <= best + 2 / 65535 + 1e-6)[varied].all()


def test_double_quantization_of_a_whole_weight():
    """The scales come back to 1 %, and the weight's error grows by less than a hundredth of itself."""
    weight = torch.randn(512, 256)
    q = quantize_nf4(weight)
    absmax = double_dequantize(double_quantize(q.absmax))
    assert (absmax / q.absmax - 1).abs().max() < 0.02
    errors = [(dequantize_nf4(x) - weight).norm() for x in (q, dataclasses.replace(q, absmax=absmax))]
    assert errors[0] < errors[1] < 1.01 * errors[0]
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    difference = (bnb.dequantize_4bit(packed, state) - dequantize_nf4(dataclasses.replace(q, absmax=absmax))).norm()
    assert difference < 1e-3 * weight.norm()


def test_what_double_quantization_refuses():
    with pytest.raises(ValueError, match="absmax is empty"):
        double_quantize(torch.empty(0))
    with pytest.raises(ValueError, match="absmax holds NaN or inf"):
        double_quantize(torch.tensor([1.0, float("nan")]))


# Bits


def test_bits_are_those_that_bitsandbytes_stores():
    weight = torch.randn(512, 64)  # full blocks on both levels, for each block size below
    for block_size in (32, 64, 128):
        for double_quant in (False, True):
            packed, state = bnb.quantize_4bit(
                weight, blocksize=block_size, quant_type="nf4", compress_statistics=double_quant
            )
            stored = packed.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if double_quant else 0)
            assert bits_per_parameter(block_size, double_quant) == 8 * stored / weight.numel()


def test_published_bits():
    """QLoRA, section 3: 0.5 bits for the scales, and 8/64 + 32/(64 * 256) = 0.127 with double quantization."""
    assert bits_per_parameter() == 4.5
    assert round(bits_per_parameter(double_quant=True), 3) == 4.127
    assert bits_per_parameter(128, True, 512) == 4 + 8 / 128 + 32 / (128 * 512)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_to_bitsandbytes_on_cuda(dtype):
    """Full blocks only: the kernels may scale a short last block in another way."""
    weight = torch.randn(256, 512, device="cuda").to(dtype)
    q = quantize_nf4(weight)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4")
    assert torch.equal(q.packed(), packed)
    assert torch.equal(q.absmax, state.absmax)
    assert torch.equal(dequantize_nf4(q), bnb.dequantize_4bit(packed, state))
    d = double_quantize(q.absmax)
    _, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    theirs = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    torch.testing.assert_close(double_dequantize(d), theirs, rtol=1e-2, atol=0)
