"""What notebook 08 says of bitsandbytes, PEFT and the Trainer, beyond what its stored outputs show."""

import warnings

from helpers import data, models, quantization, training
from helpers.hardware import profile

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import DataCollatorForSeq2Seq, set_seed

CHECKPOINTING = {"use_reentrant": False}


@pytest.fixture(scope="module")
def rows():
    return data.encode(data.load_commands("train"), models.load_tokenizer("tiny"))


def _qlora(rank=8, **options):
    set_seed(0)
    base = models.load_base("tiny", quantization="nf4")
    base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs=CHECKPOINTING)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    return get_peft_model(base, config)


def _train(model, rows, folder, **overrides):
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 5e-3} | overrides
    arguments = training.training_arguments(folder, logging_steps=1, **settings)
    trainer = training.build_trainer(model, arguments, models.load_tokenizer("tiny"), rows)
    trainer.train()
    return trainer


def _state(trainer):
    return {p: entry["state1"] for p, entry in trainer.optimizer.optimizer.state.items()}


def _adapter(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.slow
@pytest.mark.skipif(profile().device != "cpu", reason="about the fallback on a CPU")
def test_on_a_cpu_the_paged_optimizer_is_the_unpaged_one_with_a_warning(rows, tmp_path):
    plain, paged = _qlora(rank=32), _qlora(rank=32)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Paged optimizers")
        trainer = _train(plain, rows, tmp_path, optim="adamw_8bit")
    assert {state.dtype for state in _state(trainer).values()} == {torch.uint8}
    start = _adapter(_qlora(rank=32))
    with pytest.warns(UserWarning, match="Paged optimizers are not supported on CPU"):
        _train(paged, rows, tmp_path, optim="paged_adamw_8bit")
    assert torch.equal(_adapter(plain), _adapter(paged))
    assert not torch.equal(_adapter(plain), start)


@pytest.mark.parametrize(("elements", "dtype"), [(4095, torch.float32), (4096, torch.uint8)])
def test_state_is_8_bit_from_4096_elements_on(elements, dtype):
    parameter = nn.Parameter(torch.zeros(elements, device=profile().device))
    parameter.grad = torch.ones_like(parameter)
    optimizer = bitsandbytes.optim.AdamW8bit([parameter])
    optimizer.step()
    state = optimizer.state[parameter]
    assert state["state1"].dtype == state["state2"].dtype == dtype
    assert ("absmax1" in state) == (dtype == torch.uint8)


@pytest.mark.parametrize(("elements", "pages"), [(99_999, 0), (100_000, 1)])
def test_a_state_tensor_is_paged_from_100000_elements_on(elements, pages, monkeypatch):
    """On the meta device, since paged memory is CUDA's: only the decision is looked at."""
    paged = []
    monkeypatch.setattr(
        bitsandbytes.functional, "get_paged", lambda *shape, **options: paged.append(shape) or torch.zeros(1)
    )
    monkeypatch.setattr(bitsandbytes.functional, "fill", lambda *arguments: None)
    optimizer = bitsandbytes.optim.PagedAdamW8bit([nn.Parameter(torch.zeros(1))])
    monkeypatch.setattr(optimizer, "page_mng", type("Manager", (), {"paged_tensors": []})())
    optimizer.get_state_buffer(torch.zeros(elements, device="meta"), dtype=torch.uint8)
    assert len(paged) == pages


@pytest.mark.cuda
def test_on_cuda_large_state_is_paged(rows, tmp_path):
    """Rank 1024 makes every matrix of tiny large enough."""
    pages = bitsandbytes.functional.GlobalPageManager.get_instance().paged_tensors
    before = len(pages)
    trainer = _train(_qlora(rank=1024), rows, tmp_path, optim="paged_adamw_8bit")
    matrices = sum(p.numel() >= 100_000 for p in _state(trainer))
    assert matrices == 56
    assert len(pages) - before == 2 * matrices  # two moments each
    assert all(getattr(state, "is_paged", False) for state in _state(trainer).values())


def _dequantized(model):
    """tiny with the 4-bit weights of `model`, expanded by the course's own NF4 where bitsandbytes' is not trusted."""
    plain = models.load_base("tiny", dtype=torch.float32)
    for name, layer in model.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            own = quantization.dequantize_nf4(quantization.quantize_nf4(weight))
            assert torch.allclose(own, weight, atol=1e-6)  # it lies on NF4's grid
            plain.get_submodule(name).weight.data.copy_(weight)
    return plain


@pytest.mark.slow
def test_merging_into_the_dequantized_base_is_exact_and_into_four_bits_is_not(rows):
    model = _qlora(init_lora_weights=False).eval()
    batch = DataCollatorForSeq2Seq(models.load_tokenizer("tiny"))([rows[i] for i in range(4)])
    batch = {key: value.to(model.device) for key, value in batch.items()}
    with torch.no_grad():
        right = model(**batch).logits
        plain = _dequantized(models.load_base("tiny", quantization="nf4"))
        set_seed(0)
        plain_lora = get_peft_model(plain, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        plain_lora.load_state_dict({n: p for n, p in model.state_dict().items() if "lora_" in n}, strict=False)
        exact = (plain_lora.merge_and_unload()(**batch).logits - right).norm() / right.norm()
        with pytest.warns(UserWarning, match="Merge lora module to 4-bit linear may get different generations"):
            merged = model.merge_and_unload()
        rounded = (merged(**batch).logits - right).norm() / right.norm()
    assert exact < 1e-4
    assert rounded > 0.02
    assert isinstance(merged.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)
