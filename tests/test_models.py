"""The base models: tiny's quality, smollm2's origin, and what is refused."""

import json
import math

from helpers import data, evaluation, models, training
from helpers.hardware import profile
from helpers.pretrain_tiny import held_out_perplexity

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM, set_seed

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


def test_tiny_knows_its_world(tokenizer):
    """The perplexity that training.json states is the model's, and far below an untrained model's."""
    stated = json.loads((models.TINY / "training.json").read_text())["held_out_perplexity"]
    model = models.load_base("tiny", device="cpu")
    measured = held_out_perplexity(model, tokenizer, count=400)
    assert math.isclose(measured, stated["trained"], rel_tol=0.01)
    assert stated["untrained"] > 100 * measured


def _lora_run(model, tokenizer, tmp_path):
    """60 steps of LoRA on the sample task; returns the validation loss and the exact match on the test split."""
    set_seed(0)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    arguments = training.training_arguments(
        profile(), tmp_path, max_steps=60, per_device_train_batch_size=16, learning_rate=5e-3, logging_steps=60
    )
    rows = data.encode(data.load_commands("train"), tokenizer)
    training.build_trainer(model, arguments, tokenizer, rows).train()
    loss = evaluation.completion_loss(model, tokenizer, data.load_commands("validation"))
    return loss, evaluation.exact_match(model, tokenizer, data.load_commands("test"), batch_size=120).score


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


@pytest.mark.parametrize("quantization", ["nf4", BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")])
def test_quantization_keeps_the_model_usable(quantization, tokenizer):
    four_bit = models.load_base("tiny", quantization=quantization)
    layer = four_bit.model.layers[0].mlp.down_proj
    kind = quantization if isinstance(quantization, str) else quantization.bnb_4bit_quant_type
    assert type(layer).__name__ == "Linear4bit"
    assert layer.weight.quant_state.quant_type == kind
    assert layer.weight.quant_state.nested == (quantization == "nf4")
    if quantization == "nf4":
        assert layer.compute_dtype == profile().compute_dtype
    four_bit.eval()
    assert held_out_perplexity(four_bit, tokenizer, count=40) < 1.5 * held_out_perplexity(
        models.load_base("tiny"), tokenizer, count=40
    )


def test_an_unknown_quantization_is_refused():
    with pytest.raises(ValueError, match=r'quantization=.int3.: expected None, "nf4" or a BitsAndBytesConfig'):
        models.load_base("tiny", quantization="int3")


def test_dtype_and_device_are_taken():
    model = models.load_base("tiny", dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.device.type == "cpu"


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


def test_an_unknown_hub_id_fails_without_a_network():
    with pytest.raises(OSError, match="no-such-owner/no-such-model"):
        models.load_base("no-such-owner/no-such-model")


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
