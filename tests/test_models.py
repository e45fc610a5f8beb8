"""The base models: tiny's quality, smollm2's origin, and what is refused."""

import json
import math

from helpers import data, evaluation, models, training
from helpers.hardware import profile
from helpers.makers.pretrain_tiny import held_out_perplexity

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DataCollatorForSeq2Seq, LlamaForCausalLM, set_seed
from transformers.utils import logging as transformers_logging

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def tokenizer():
    return models.load_tokenizer("tiny")


def test_tiny_is_small_and_plain():
    model = models.load_base("tiny", device="cpu")
    assert isinstance(model, LlamaForCausalLM)
    assert sum(p.numel() for p in model.parameters()) < 1_100_000
    assert sum(file.stat().st_size for file in models.TINY.iterdir()) < 5_000_000
    assert {file.suffix for file in models.TINY.iterdir()} == {".json", ".safetensors"}
    assert not model.training
    # bitsandbytes' 4-bit kernels for the CPU need rows that are a multiple of the block of 64
    assert all(m.in_features % 64 == 0 for m in model.modules() if isinstance(m, torch.nn.Linear))


@pytest.mark.slow
def test_tiny_knows_its_world(tokenizer):
    """The perplexity that training.json states is the model's, and far below an untrained model's."""
    stated = json.loads((models.TINY / "training.json").read_text())["held_out_perplexity"]
    model = models.load_base("tiny", device="cpu")
    measured = held_out_perplexity(model, tokenizer, count=400)
    assert math.isclose(measured, stated["trained"], rel_tol=0.01)
    assert stated["untrained"] > 100 * measured


def _lora_run(model, tokenizer, tmp_path):
    """40 steps of LoRA on the sample task; returns the validation loss and the exact match on the test split."""
    set_seed(0)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    arguments = training.training_arguments(
        tmp_path, max_steps=40, per_device_train_batch_size=16, learning_rate=5e-3, logging_steps=40
    )
    rows = data.encode(data.load_commands("train"), tokenizer)
    training.build_trainer(model, arguments, tokenizer, rows).train()
    loss = evaluation.completion_loss(model, tokenizer, data.load_commands("validation"))
    return loss, evaluation.exact_match(model, tokenizer, data.load_commands("test"), batch_size=120).score


@pytest.mark.slow
def test_lora_on_tiny_learns_the_sample_task_and_on_an_untrained_base_does_not(tokenizer, tmp_path):
    pretrained = models.load_base("tiny")
    test = data.load_commands("test")
    assert evaluation.exact_match(pretrained, tokenizer, test, batch_size=120).score == 0.0
    set_seed(1)
    untrained = AutoModelForCausalLM.from_config(pretrained.config).to(pretrained.device)
    loss, match = _lora_run(pretrained, tokenizer, tmp_path)
    loss_untrained, match_untrained = _lora_run(untrained, tokenizer, tmp_path)
    assert loss_untrained > 10 * loss
    assert match >= 0.5
    assert match_untrained == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4", BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")])
def test_quantization_keeps_the_model_usable(quantization, tokenizer):
    four_bit = models.load_base("tiny", quantization=quantization)
    layer = four_bit.model.layers[0].mlp.down_proj
    kind = quantization if isinstance(quantization, str) else quantization.bnb_4bit_quant_type
    assert type(layer).__name__ == "Linear4bit"
    assert layer.weight.quant_state.quant_type == kind
    assert layer.weight.quant_state.nested == (quantization == "nf4")
    if quantization == "nf4":
        assert layer.compute_dtype == profile().dtype
    four_bit.eval()
    assert held_out_perplexity(four_bit, tokenizer, count=40) < 1.5 * held_out_perplexity(
        models.load_base("tiny"), tokenizer, count=40
    )


def _gradient(model, batch):
    """The adapter's gradient in one vector."""
    model.train()
    model.zero_grad()
    model(**batch).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _evaluate(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


def _allow_repacking(model):
    for layer in (module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)):
        layer.support_avx512bf16_for_cpu = True


@pytest.fixture
def four_bit_with_adapter(tokenizer):
    """tiny in NF4 on the CPU, with an adapter that is not zero, and a batch."""
    model = models.load_base("tiny", quantization="nf4", device="cpu")
    model = get_peft_model(model, LoraConfig(r=8, target_modules=LINEAR, init_lora_weights=False))
    return model, DataCollatorForSeq2Seq(tokenizer)(
        list(data.encode(data.load_commands("test").select(range(4)), tokenizer))
    )


def test_an_evaluation_leaves_a_four_bit_model_trainable(four_bit_with_adapter):
    model, batch = four_bit_with_adapter
    before = _gradient(model, batch)
    _evaluate(model, batch)
    assert torch.equal(_gradient(model, batch), before)


def test_four_bit_weights_are_not_repacked_on_a_cpu_that_could(four_bit_with_adapter, monkeypatch):
    """The same on every CPU: bitsandbytes believes that this one has AVX512-BF16, and says when it would repack."""
    model, batch = four_bit_with_adapter
    repacked = []

    def repack(weight, state):
        repacked.append(weight)
        return weight, state

    modules = bitsandbytes.nn.modules
    if not hasattr(modules, "_convert_weight_packed_for_cpu"):
        pytest.skip("this version of bitsandbytes does not repack weights")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", repack)
    assert modules.Linear4bit(64, 64).support_avx512bf16_for_cpu
    model = models.load_base("tiny", quantization="nf4", device="cpu")
    _evaluate(model, batch)
    assert not repacked
    _allow_repacking(model)
    _evaluate(model, batch)
    assert len(repacked) == 28


@pytest.mark.skipif(not bitsandbytes.functional.has_avx512bf16(), reason="needs a CPU with AVX512-BF16")
def test_what_repacking_does(four_bit_with_adapter):
    """The reason for it all, should bitsandbytes mend it: no gradient through the base, and coarser block scales."""
    model, batch = four_bit_with_adapter
    before = _gradient(model, batch)
    _allow_repacking(model)
    _evaluate(model, batch)
    assert (_gradient(model, batch) - before).norm() > 0.5 * before.norm()
    model.state_dict()  # unpacks
    error = (_gradient(model, batch) - before).norm() / before.norm()
    assert 1e-4 < error < 0.05


def test_the_progress_bar_stays_off_where_it_was_off():
    assert transformers_logging.is_progress_bar_enabled()
    models.load_base("tiny")
    assert transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        models.load_base("tiny")
        assert not transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.enable_progress_bar()


def test_dtype_and_device_are_taken():
    model = models.load_base("tiny", dtype=torch.bfloat16, device="cpu")
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, "cpu")}


def test_an_unknown_quantization_and_hub_id_are_refused():
    with pytest.raises(ValueError, match=r'quantization=.int3.: expected None, "nf4" or a BitsAndBytesConfig'):
        models.load_base("tiny", quantization="int3")
    with pytest.raises(OSError, match="no-such-owner/no-such-model"):  # without a network
        models.load_base("no-such-owner/no-such-model")


def test_a_folder_with_pickled_weights_only_is_refused(tmp_path):
    model = models.load_base("tiny", device="cpu")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        models.load_base(str(tmp_path))


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    """A folder whose configuration names its own Python classes: the file must not be executed."""
    ran = tmp_path / "ran"
    (tmp_path / "modeling_evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Evil: pass\n")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}})
    )
    with pytest.raises(ValueError, match=r"trust_remote_code|evil"):
        models.load_base(str(tmp_path))
    assert not ran.exists()


def test_smollm2_is_the_model_of_the_wheel(smollm2):
    model = models.load_base("smollm2-135m", device="cpu")
    tokenizer = models.load_tokenizer("smollm2-135m")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert {p.dtype for p in model.parameters()} == {profile().dtype}
    assert not hasattr(model.config, "quantization_config")
    assert tokenizer.eos_token == "<|im_end|>"
    row = data.encode(data.load_commands("test").select([0]), tokenizer)[0]
    assert row["labels"][-1] == tokenizer.eos_token_id
    # It is the trained model, not a random one of the same shape: it knows how this goes on.
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax()) == " Paris"
