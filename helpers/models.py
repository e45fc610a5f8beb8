"""Base models by name: `tiny` ships in the package, `smollm2-135m` is fetched once, any other name is a hub id."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from helpers.fetch import fetch_smollm2
from helpers.hardware import profile

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

TINY = Path(__file__).parent / "assets" / "tiny"
HUB_NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def load_base(
    name: str = "tiny",
    *,
    quantization: str | BitsAndBytesConfig | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> PreTrainedModel:
    """Load a base model for fine-tuning: safetensors weights only, and never code from the model's folder.

    Args:
        name: "tiny" (0.95M parameters, in the package), "smollm2-135m" (SmolLM2-135M-Instruct, fetched on first use,
            see `helpers.fetch`), a folder, or the id of a model on the Hugging Face hub.
        quantization: None, or "nf4" for 4-bit NormalFloat weights with double quantization as in QLoRA, or a
            BitsAndBytesConfig of your own.
        dtype: of the weights, or of what stays unquantized. Default: the hardware profile's.
        device: where to put it. Default: the hardware profile's.

    Returns:
        The model, in eval mode. A 4-bit model can also be trained after it has been used in eval mode, which
        bitsandbytes by itself prevents on some CPUs.

    Raises:
        RuntimeError: "smollm2-135m" is not in the cache and cannot be fetched.
        OSError: no such model, or it has no safetensors weights.
    """
    hardware = profile()
    dtype = dtype or hardware.dtype
    device = torch.device(device or hardware.device)
    if quantization == "nf4":
        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        quantization = BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=hardware.dtype)
    elif quantization is not None and not isinstance(quantization, BitsAndBytesConfig):
        raise ValueError(f'quantization={quantization!r}: expected None, "nf4" or a BitsAndBytesConfig')
    options = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
    if quantization is not None:
        options |= {"quantization_config": quantization, "device_map": {"": device}}
    source = _source(name)
    try:
        with _no_progress_bar():
            model = AutoModelForCausalLM.from_pretrained(source, **options)
    except OSError as error:  # transformers does not always name the model
        raise OSError(f"cannot load {name!r}: {error}") from error
    if quantization is None:
        return model.to(device)
    _never_repack(model)
    return model


def load_tokenizer(name: str = "tiny") -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base model; the names are those of `load_base`.

    Where a tokenizer has no padding token, its EOS is used. That is safe with labels that mask padding by position.
    """
    tokenizer = AutoTokenizer.from_pretrained(_source(name), trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def public_name(name: str) -> str:
    """Return the name by which others know a base model: the hub's, and of a folder its last part and not its path."""
    return HUB_NAMES.get(name) or (Path(name).resolve().name if Path(name).is_dir() else name)


def enable_checkpointing(model: nn.Module, **options: object) -> None:
    """Turn on gradient checkpointing: store each layer's input only and recompute the layer in the backward pass.

    `model` is a transformers model, with or without PEFT; `options` are those of `torch.utils.checkpoint.checkpoint`.
    """
    # The method has its new name since transformers 5.23.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options or None)


def _never_repack(model: PreTrainedModel) -> None:
    """Have bitsandbytes (0.49 and newer) leave 4-bit weights as they are.

    On a CPU with AVX512-BF16 its `Linear4bit` in eval mode repacks its weights in place for inference, and rounds their
    block scales to bf16. The packed format has no backward pass: training after an evaluation gets no gradient there.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Hide the bar "Loading weights", which is gone in a second. Downloads from a hub have their own, which stays."""
    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()


def _source(name: str) -> str:
    if name == "tiny":
        return str(TINY)
    if name == "smollm2-135m":
        return str(fetch_smollm2())
    return name
