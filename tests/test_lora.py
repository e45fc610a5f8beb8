"""helpers.lora against PEFT, which is the independent truth here, and against published parameter counts."""

import copy
import math

from helpers.lora import LoRALinear, inject_lora, lora_parameter_count

import pytest
import shared
import torch
from bitsandbytes.nn import Linear4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MixtralConfig,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaModel,
)

BERT = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
LAYERS_OF_A_BLOCK = 7  # q, k, v, o, gate, up, down
# Both sides run the same operations in the same order; the tolerances leave room for another order of summation.
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-14},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2},
}


def llama(dtype: torch.dtype = torch.float64, tied: bool = False) -> LlamaForCausalLM:
    return shared.llama(dtype, tie_word_embeddings=tied).eval()


def with_peft(model: nn.Module, r: int, alpha: float, targets: list[str] | str, **options: object) -> PeftModel:
    return get_peft_model(model, LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, **options))


def peft_layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def factors(layer: LoRALinear | LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    """Return A and B of either implementation."""
    if isinstance(layer, LoRALinear):
        return layer.lora_A, layer.lora_B
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def pair(base: nn.Module, r: int, alpha: float, targets: list[str] | str, **options: object) -> tuple:
    """Put LoRA on two copies of `base`, by PEFT and by helpers.lora, with the same random A and B."""
    theirs = with_peft(copy.deepcopy(base), r, alpha, targets, **options)
    ours = inject_lora(copy.deepcopy(base), targets, r, alpha, **options)
    assert lora_layers(ours).keys() == peft_layers(theirs).keys()
    for name, layer in lora_layers(ours).items():
        for mine, reference in zip(factors(layer), factors(peft_layers(theirs)[name]), strict=True):
            assert mine.shape == reference.shape
            assert mine.dtype == reference.dtype
            nn.init.normal_(reference)
            mine.data.copy_(reference.data)
    return ours, theirs


def assert_same_layers(ours: nn.Module, theirs: nn.Module, tolerance: dict[str, float]) -> None:
    """Compare scaling, delta weight and the gradients of A and B, layer by layer."""
    for name, layer in lora_layers(ours).items():
        reference = peft_layers(theirs)[name]
        assert layer.scaling == reference.scaling["default"]
        torch.testing.assert_close(layer.delta_weight(), reference.get_delta_weight("default"), **tolerance)
        for mine, other in zip(factors(layer), factors(reference), strict=True):
            assert other.grad is not None
            torch.testing.assert_close(mine.grad, other.grad, **tolerance)


def merged_model(model: nn.Module) -> nn.Module:
    """Replace every LoRALinear by its merged linear layer, as PEFT's merge_and_unload does."""
    for name, layer in lora_layers(model).items():
        model.set_submodule(name, layer.merge())
    return model


def snapshot(model: nn.Module) -> list[tuple]:
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    return modules + [(name, p.requires_grad, id(p)) for name, p in model.named_parameters(remove_duplicate=False)]


# The layer


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    r=st.integers(1, 12),
    alpha=st.sampled_from([0.5, 1, 8, 16, 33]),
    use_rslora=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    leading=st.lists(st.integers(0, 4), max_size=3),
)
def test_a_layer_equals_pefts(sizes, r, alpha, use_rslora, bias, dtype, leading):
    base = nn.Sequential(nn.Linear(*sizes, bias=bias, dtype=dtype))
    ours, theirs = pair(base, r, alpha, ["0"], use_rslora=use_rslora)
    inputs = [torch.randn(*leading, sizes[0], dtype=dtype).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    mine, reference = ours(inputs[0]), theirs(inputs[1])

    assert mine.shape == (*leading, sizes[1])
    assert mine.dtype == reference.dtype == dtype
    torch.testing.assert_close(mine, reference, **TOLERANCE[dtype])

    weights = torch.randn(mine.shape, dtype=dtype)
    (mine * weights).sum().backward()
    (reference * weights).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **TOLERANCE[dtype])
    assert_same_layers(ours, theirs, TOLERANCE[dtype])

    merged, reference = ours[0].merge(), theirs.merge_and_unload()[0]
    assert type(merged) is nn.Linear
    torch.testing.assert_close(merged.weight, reference.weight, **TOLERANCE[dtype])
    torch.testing.assert_close(merged.bias, reference.bias)


def test_the_update_by_hand():
    """Without any library: r = 2, alpha = 6, so the scaling is 3, or 6 / sqrt(2) with rsLoRA."""
    layer = LoRALinear(nn.Linear(3, 2, bias=False, dtype=torch.float64), r=2, lora_alpha=6)
    layer.base_layer.weight.zero_()
    layer.lora_A.data = torch.tensor([[1.0, 0, 0], [0, 2, 0]], dtype=torch.float64)
    layer.lora_B.data = torch.tensor([[1.0, 0], [5, 1]], dtype=torch.float64)
    delta = torch.tensor([[3.0, 0, 0], [15, 6, 0]], dtype=torch.float64)
    x = torch.tensor([1.0, 10, 100], dtype=torch.float64)
    assert torch.equal(layer.delta_weight(), delta)
    assert torch.equal(layer.merge().weight, delta)
    assert torch.equal(layer(x), delta @ x)
    assert LoRALinear(nn.Linear(3, 2), 2, 6, use_rslora=True).scaling == 6 / math.sqrt(2)


def test_the_start():
    """B is zero, so that the layer equals its base; A is uniform in +-1/sqrt(in), like PEFT's."""
    base = nn.Linear(400, 30)
    layer = LoRALinear(base, r=50, lora_alpha=16)
    x = torch.randn(5, 400)
    assert torch.equal(layer(x), base(x))
    reference, zeros = factors(peft_layers(with_peft(nn.Sequential(nn.Linear(400, 30)), 50, 16, ["0"]))["0"])
    assert not layer.lora_B.any()
    assert not zeros.any()
    for matrix in (layer.lora_A, reference):
        assert 0.049 < matrix.abs().max() <= 0.05
        assert matrix.std().item() == pytest.approx(0.05 / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_adapter_dtype_and_one_rounding_in_the_merge(dtype):
    base = nn.Linear(8, 8, dtype=dtype)
    layer = LoRALinear(base, r=2, lora_alpha=2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert LoRALinear(nn.Linear(2, 2, device="meta"), 1, 1).lora_A.is_meta
    assert layer.lora_A.dtype == layer.lora_B.dtype == layer.delta_weight().dtype == wide
    nn.init.normal_(layer.lora_B)
    before = base.weight.clone()
    merged = layer.merge()
    assert merged.weight.dtype == dtype
    assert torch.equal(merged.weight, (before.to(wide) + layer.delta_weight()).to(dtype))
    assert torch.equal(base.weight, before), "merge() must leave its own layer as it is"
    assert merged.weight.data_ptr() != base.weight.data_ptr()
    assert not any(parameter.requires_grad for parameter in merged.parameters())


def test_dropout_equals_pefts_and_follows_the_mode_of_the_model():
    base = nn.Sequential(nn.Linear(16, 5, dtype=torch.float64))
    ours, theirs = pair(base.eval(), 3, 6, ["0"], lora_dropout=0.4)
    x = torch.randn(20, 16, dtype=torch.float64)
    assert not any(module.training for module in ours.modules()), "an eval-mode model stays in eval mode"
    expected = merged_model(copy.deepcopy(ours))(x)
    torch.testing.assert_close(ours(x), expected, **TOLERANCE[torch.float64])
    ours.train(), theirs.train()
    torch.manual_seed(1)
    mine = ours(x)
    torch.manual_seed(1)
    torch.testing.assert_close(mine, theirs(x), **TOLERANCE[torch.float64])
    assert not torch.allclose(mine, expected)


def test_a_4bit_base_trains_and_does_not_merge():
    model = nn.Sequential(Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")).to("cpu")
    model.is_loaded_in_4bit = True  # from_pretrained sets it, and PEFT reads it
    ours, theirs = pair(model, 4, 8, ["0"])
    x = torch.randn(3, 64)
    torch.testing.assert_close(ours(x), theirs(x), **TOLERANCE[torch.float32])
    ours(x).square().mean().backward()
    theirs(x).square().mean().backward()
    assert_same_layers(ours, theirs, TOLERANCE[torch.float32])
    assert lora_parameter_count(model, ["0"], 4) == 4 * (64 + 32)
    with pytest.raises(TypeError, match=r"uint8.*unquantized"):
        merged_model(ours)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"r": 0}, "r=0.*r >= 1"),
        ({"r": -3}, "r=-3.*r >= 1"),
        ({"lora_alpha": 0}, "lora_alpha=0.*above 0"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0.*lora_dropout < 1"),
        ({"lora_dropout": -0.1}, "lora_dropout=-0.1.*0 <= lora_dropout"),
    ],
)
def test_numbers_out_of_range_raise_and_change_nothing(wrong, message):
    linear, model = nn.Linear(2, 2), llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        LoRALinear(linear, **{"r": 4, "lora_alpha": 8} | wrong)
    assert linear.weight.requires_grad
    with pytest.raises(ValueError, match=message):
        inject_lora(model, ["q_proj"], **{"r": 4, "lora_alpha": 8} | wrong)
    if "r" in wrong:
        with pytest.raises(ValueError, match=message):
            lora_parameter_count(model, ["q_proj"], wrong["r"])
    assert snapshot(model) == before


def test_a_base_that_is_not_linear():
    with pytest.raises(TypeError, match=r"base is a Embedding.*nn\.Linear"):
        LoRALinear(nn.Embedding(3, 2), 1, 1)


# The model


@pytest.mark.parametrize(
    ("targets", "use_rslora", "dtype"),
    [
        (["q_proj", "v_proj"], False, torch.float64),
        ("all-linear", True, torch.float64),
        ("all-linear", False, torch.bfloat16),
    ],
)
def test_a_llama_equals_pefts(targets, use_rslora, dtype):
    ours, theirs = pair(llama(dtype), 3, 7, targets, use_rslora=use_rslora)
    ids, close = torch.randint(37, (2, 9)), TOLERANCE[dtype]
    mine, reference = ours(input_ids=ids, labels=ids), theirs(input_ids=ids, labels=ids)
    assert mine.logits.dtype == dtype
    torch.testing.assert_close(mine.logits, reference.logits, **close)
    torch.testing.assert_close(mine.loss, reference.loss, **close)

    mine.loss.backward()
    reference.loss.backward()
    assert_same_layers(ours, theirs, close)
    trained = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.{factor}" for name in lora_layers(ours) for factor in ("lora_A", "lora_B")}
    assert all(p.grad is None for p in ours.parameters() if not p.requires_grad)
    count = sum(p.numel() for p in ours.parameters() if p.requires_grad)
    assert count == theirs.get_nb_trainable_parameters()[0] == lora_parameter_count(llama(), targets, 3)

    merged, reference = merged_model(ours), theirs.merge_and_unload()
    assert merged is ours
    assert [(n, type(m)) for n, m in merged.named_modules()] == [(n, type(m)) for n, m in llama().named_modules()]
    assert not any(p.requires_grad for p in merged.parameters())
    torch.testing.assert_close(merged.state_dict(), reference.state_dict(), **close)
    if dtype == torch.float64:
        torch.testing.assert_close(merged(ids).logits, mine.logits, rtol=1e-9, atol=1e-11)


class Plain(nn.Module):
    """Not a transformers model: its `lm_head` is a linear layer like any other."""

    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(4, 5)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)])


@pytest.mark.parametrize(
    ("build", "number"),
    [
        (llama, 2 * LAYERS_OF_A_BLOCK),
        (lambda: llama(tied=True), 2 * LAYERS_OF_A_BLOCK),
        (lambda: LlamaModel(llama().config), 2 * LAYERS_OF_A_BLOCK),
        (lambda: BertForSequenceClassification(BERT), 8),  # 6 in the block, pooler, classifier
        (Plain, 3),
    ],
    ids=["untied", "tied", "no head", "classifier", "plain module"],
)
def test_all_linear_means_what_peft_means(build, number):
    model = build()
    expected = peft_layers(with_peft(copy.deepcopy(model), 2, 2, "all-linear")).keys()
    count = lora_parameter_count(model, "all-linear", 2)
    ours = lora_layers(inject_lora(model, "all-linear", 2, 2))
    assert ours.keys() == expected
    assert len(ours) == number
    assert count == sum(factor.numel() for layer in ours.values() for factor in factors(layer))


@pytest.mark.parametrize(
    ("targets", "number"),
    [
        (["q_proj"], 2),
        (["self_attn.q_proj", "up_proj"], 4),
        (["layers.1.mlp.up_proj"], 1),
        (["model.layers.0.self_attn.q_proj", "q_proj"], 2),
        (["lm_head"], 1),
    ],
)
def test_names_match_as_in_peft(targets, number):
    expected = peft_layers(with_peft(llama(), 2, 2, targets)).keys()
    assert lora_layers(inject_lora(llama(), targets, 2, 2)).keys() == expected
    assert len(expected) == number


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["v_proj", "qproj"], "'qproj' matches no module; the linear layers end in .*q_proj"),
        (["proj"], "'proj' matches no module; the linear layers end in down_proj, gate_proj"),
        (["mlp.q_proj"], "'mlp.q_proj' matches no module; the linear layers end in"),
        (["all-linear"], "'all-linear' matches no module"),
        (["q_proj", "self_attn"], "model.layers.0.self_attn, a LlamaAttention: name nn.Linear layers"),
        (["embed_tokens"], "model.embed_tokens, a Embedding: name nn.Linear layers"),
        ("q_proj", r"target_modules='q_proj': pass a list, \['q_proj'\], or \"all-linear\""),
        ([], r"target_modules=\[\]: nothing to adapt"),
    ],
)
def test_bad_targets_raise_and_change_nothing(targets, message):
    model = llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        inject_lora(model, targets, 2, 2)
    with pytest.raises(ValueError, match=message):
        lora_parameter_count(model, targets, 2)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("build", "targets", "message"),
    [
        (nn.ReLU, "all-linear", "nothing to adapt"),
        (nn.ReLU, ["proj"], "matches no module; the linear layers end in nothing: there is none"),
        (lambda: nn.Linear(2, 2), "all-linear", "nothing to adapt"),
        (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2)), "all-linear", "a Conv1D"),
    ],
)
def test_models_without_a_target(build, targets, message):
    with pytest.raises(ValueError, match=message):
        inject_lora(build(), targets, 2, 2)


def test_tied_weights():
    """LoRA beside tied weights leaves the tie alone; on a tied layer it is refused."""
    model = llama(tied=True)
    before = snapshot(model)
    with pytest.raises(ValueError, match="lm_head, whose weight is tied"):
        inject_lora(model, ["q_proj", "lm_head"], 2, 2)
    assert snapshot(model) == before
    embeddings = model.get_input_embeddings().weight.clone()
    inject_lora(model, "all-linear", 2, 2)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B)
    merged_model(model)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, embeddings)

    twice = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="first, whose weight is tied"):
        inject_lora(nn.ModuleDict({"first": twice, "second": twice}), ["first"], 2, 2)


@pytest.mark.parametrize("first", [inject_lora, lambda model, targets, r, alpha: with_peft(model, r, alpha, targets)])
def test_a_model_with_lora_is_refused(first):
    model = first(llama(), ["q_proj"], 2, 2)
    before = snapshot(model)
    for targets in (["q_proj"], ["v_proj"], "all-linear"):
        with pytest.raises(ValueError, match=r"has LoRA layers already.*load the base model again"):
            inject_lora(model, targets, 2, 2)
        with pytest.raises(ValueError, match="has LoRA layers already"):
            lora_parameter_count(model, targets, 2)
    assert snapshot(model) == before


def test_inject_again_after_a_merge():
    model = merged_model(inject_lora(llama(), ["q_proj"], 2, 2))
    assert len(lora_layers(inject_lora(model, ["v_proj"], 2, 2))) == 2
    assert len(lora_layers(inject_lora(with_peft(llama(), 2, 2, ["q_proj"]).merge_and_unload(), ["v_proj"], 2, 2))) == 2


# Counts, on the meta device

ROBERTA_BASE = RobertaConfig()
ROBERTA_LARGE = RobertaConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
LLAMA_2_7B = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
QWEN_3B = Qwen2Config(
    hidden_size=2048,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    intermediate_size=11008,
    vocab_size=151936,
    tie_word_embeddings=True,
)
# OPT-175B has GPT-3's shapes: 96 blocks of width 12288. Unlike GPT-2's code it has a layer each for q, k, v and o.
GPT_3 = OPTConfig(
    hidden_size=12288, word_embed_proj_dim=12288, ffn_dim=49152, num_hidden_layers=96, num_attention_heads=96
)
QUERY_VALUE = ["q_proj", "v_proj"]
ALL_FOUR = ["q_proj", "k_proj", "v_proj", "out_proj"]


@pytest.mark.parametrize(
    ("architecture", "config", "targets", "r", "exact", "published"),
    [
        # Hu et al. 2021, Table 4 and section D.4: 4.7M for r_q = r_v = 1 or r_v = 2, 37.7M for r_q = r_v = 8.
        (OPTForCausalLM, GPT_3, QUERY_VALUE, 1, 4_718_592, "4.7M"),
        (OPTForCausalLM, GPT_3, ["v_proj"], 2, 4_718_592, "4.7M"),
        (OPTForCausalLM, GPT_3, QUERY_VALUE, 8, 37_748_736, "37.7M"),
        # Section D.4 also gives 37.7M for r = 2 on all four; that is half of it, and r = 4 is meant (as in Table 15).
        (OPTForCausalLM, GPT_3, ALL_FOUR, 4, 37_748_736, "37.7M"),
        # Table 5, a budget of "18M" for one matrix with r = 8, two with r = 4, four with r = 2: 18 x 2^20.
        (OPTForCausalLM, GPT_3, ["q_proj"], 8, 18 * 2**20, None),
        (OPTForCausalLM, GPT_3, QUERY_VALUE, 4, 18 * 2**20, None),
        (OPTForCausalLM, GPT_3, ALL_FOUR, 2, 18 * 2**20, None),
        # Table 2, with r_q = r_v = 8 (Table 9); the classification heads are not counted there.
        (RobertaModel, ROBERTA_BASE, ["query", "value"], 8, 294_912, "0.3M"),
        (RobertaModel, ROBERTA_LARGE, ["query", "value"], 8, 786_432, "0.8M"),
        # PEFT's README, Qwen2.5-3B-Instruct: "trainable params: 3,686,400". Here v_proj is 2048 -> 256.
        (Qwen2ForCausalLM, QWEN_3B, QUERY_VALUE, 16, 3_686_400, None),
        # Llama-2-7B at QLoRA's setting, by hand: 32 blocks, r * (in + out), four 4096 x 4096 and three 4096 x 11008.
        (LlamaForCausalLM, LLAMA_2_7B, "all-linear", 64, 32 * 64 * (4 * 8192 + 3 * (4096 + 11008)), None),
    ],
)
def test_counts_on_the_meta_device(architecture, config, targets, r, exact, published):
    model = on_meta(architecture, config)
    before = snapshot(model)
    assert lora_parameter_count(model, targets, r) == exact
    assert snapshot(model) == before
    if published:
        assert f"{exact / 1e6:.1f}M" == published


def on_meta(architecture: type[PreTrainedModel], config: object) -> PreTrainedModel:
    with torch.device("meta"):
        return architecture(config)


def test_experts_in_one_parameter_are_refused_by_name():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        ValueError, match=r"^model.layers.0.mlp.experts.gate_up_proj holds the matrices of several experts"
    ):
        lora_parameter_count(model, "all-linear", 4)
    assert lora_parameter_count(model, ["q_proj"], 4) == 4 * (32 + 32)
