"""Memory: what is predicted from a configuration against what real models take."""

import contextlib

from helpers import memory, meta_step, models
from helpers.models import enable_checkpointing, load_base

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from shared import llama_config
from torch import nn
from torch.autograd.profiler import profile
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig

LLAMA_2_7B = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_attention_heads=32)


def small_llama(layers=4, **changes):
    return llama_config(**({"vocab_size": 384, "intermediate_size": 192, "num_hidden_layers": layers} | changes))


def tiny_config():
    return AutoConfig.from_pretrained(models.TINY)


def real_model(name, *, r, quantization=None, dtype="float32", checkpointing=False, device="cpu", targets="all-linear"):
    """The model as the estimate describes it, loaded and prepared with the libraries' own functions."""
    model = load_base(name, quantization=quantization, dtype=getattr(torch, dtype), device=device)
    if quantization:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if checkpointing:
        enable_checkpointing(model)
        model.enable_input_require_grads()
    if r is not None:
        model = get_peft_model(model, LoraConfig(r=r, target_modules=targets, task_type="CAUSAL_LM"))
    return model.train()  # before any forward pass: in eval mode bitsandbytes repacks 4-bit weights on some CPUs


def optimizer_after_a_step(model, kind=torch.optim.AdamW):
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = kind(trainable)
    for parameter in trainable:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def stored(tensors):
    """Bytes of the storages that the tensors lie in, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def quantization_tensors(model):
    states = [p.quant_state for p in model.parameters() if isinstance(p, bnb.nn.Params4bit)]
    tensors = [t for state in states for t in (state.absmax, state.code)]
    return tensors + [t for s in states if s.nested for t in (s.offset, s.state2.absmax, s.state2.code)]


def static_bytes(model, optimizer):
    """What lies there before the step, part by part, counted from the real tensors."""
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    state = [t for values in optimizer.state.values() for t in values.values() if torch.is_tensor(t) and t.dim()]
    return {
        "weights": stored([*model.parameters(), *model.buffers()]) - stored(adapters),
        "quantization_constants": stored(quantization_tensors(model)),
        "adapters": stored(adapters),
        "optimizer_state": stored(state),
    }


def batch(rows, tokens, padded, device="cpu"):
    ids = torch.randint(5, 700, (rows, tokens), device=device)
    mask, labels = torch.ones_like(ids), ids.clone()
    if padded:
        mask[0, -3:], labels[0, -3:] = 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def measured_peak(model, optimizer, inputs, autocast=None):
    """Bytes that the second step of the usual loop needs above what lies there before it."""
    device = inputs["input_ids"].device
    with memory.measure_peak_memory(device) as measured:
        with torch.autocast(device.type, autocast) if autocast else contextlib.nullcontext():
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return measured.peak


# model, adapter, quantization, checkpointing, rows, tokens, padded, dtype. bfloat16 runs under autocast.
TABLE = [
    ("tiny", 8, None, False, 8, 64, False, "float32"),
    ("tiny", 64, None, False, 2, 200, True, "float32"),
    ("tiny", 8, None, True, 8, 64, True, "float32"),
    ("tiny", 8, None, True, 2, 200, True, "float32"),
    ("tiny", 8, "nf4", False, 8, 64, True, "float32"),
    ("tiny", 8, "nf4", True, 8, 64, False, "float32"),
    ("tiny", 8, "nf4", True, 2, 200, True, "float32"),
    ("tiny", 8, None, False, 8, 64, False, "bfloat16"),
    ("tiny", 8, None, True, 8, 64, True, "bfloat16"),
    ("tiny", 8, "nf4", False, 8, 64, False, "bfloat16"),
    ("tiny", None, None, False, 8, 64, False, "float32"),
    ("tiny", None, None, False, 1, 16, False, "float32"),
    ("smollm2-135m", 8, None, False, 1, 48, False, "float32"),
    ("smollm2-135m", 8, None, True, 2, 24, True, "float32"),
    ("smollm2-135m", 8, "nf4", False, 2, 24, True, "float32"),
    ("smollm2-135m", 8, "nf4", True, 1, 48, False, "float32"),
]


FIELDS = ("name", "r", "quantization", "checkpointing", "rows", "tokens", "padded", "dtype")


@pytest.mark.parametrize(
    FIELDS,
    [pytest.param(*row, marks=() if row in (TABLE[0], TABLE[6]) else pytest.mark.slow) for row in TABLE],
)
def test_predicted_and_measured_agree(name, r, quantization, checkpointing, rows, tokens, padded, dtype, request):
    """The static parts agree to the byte, the peak of the step and the total within 3 %. `-s` prints the rows."""
    folder = models.TINY if name == "tiny" else request.getfixturevalue("smollm2")
    model = real_model(name, r=r, quantization=quantization, dtype=dtype, checkpointing=checkpointing)
    optimizer = optimizer_after_a_step(model)
    static = static_bytes(model, optimizer)
    autocast = None if dtype == "float32" else getattr(torch, dtype)
    peak = measured_peak(model, optimizer, batch(rows, tokens, padded), autocast)
    estimate = memory.estimate_training_memory(
        AutoConfig.from_pretrained(folder),
        r=r,
        quantization=quantization,
        dtype=dtype,
        batch_size=rows,
        sequence_length=tokens,
        gradient_checkpointing=checkpointing,
        padded=padded,
        device="cpu",
    )
    measured = sum(static.values()) + peak
    row = (name, f"r={r}", quantization or "-", "ckpt" if checkpointing else "-", f"{rows}x{tokens}")
    words = (*row, "padded" if padded else "-", dtype)
    print(
        *(f"{word:13}" for word in words), f"{estimate.total:12,} {measured:12,} {estimate.total / measured - 1:+.2%}"
    )
    assert {part: getattr(estimate, part) for part in static} == static
    assert estimate.static == sum(static.values())
    assert estimate.total == pytest.approx(measured, rel=0.03)
    assert estimate.total - estimate.static == pytest.approx(peak, rel=0.03)
    assert estimate.gradients == sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    assert sum(estimate.at_peak.values()) == estimate.total


@pytest.mark.parametrize(
    ("quantization", "checkpointing", "padded"), [(None, False, False), ("nf4", False, True), (None, True, True)]
)
def test_activations_are_what_autograd_saves(quantization, checkpointing, padded):
    model = real_model("tiny", r=8, quantization=quantization, checkpointing=checkpointing)
    weights = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *quantization_tensors(model)]}
    kept, logits = {}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            (logits if tensor.shape[-1:] == (768,) else kept)[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch(4, 96, padded), use_cache=False).loss
    estimate = memory.estimate_training_memory(
        tiny_config(),
        r=8,
        quantization=quantization,
        dtype="float32",
        batch_size=4,
        sequence_length=96,
        gradient_checkpointing=checkpointing,
        padded=padded,
    )
    assert loss.requires_grad
    # Checkpointing holds the mask and the rotary tables outside autograd's saved tensors.
    held = padded * 4 * 96 * 96 + 2 * 96 * 32 * 4 if checkpointing else 0
    assert estimate.activations == pytest.approx(sum(kept.values()) + held, rel=0.01)
    assert sum(logits.values()) == 4 * 96 * 768 * 4  # the log-softmax
    assert estimate.logits == 3 * 4 * 96 * 768 * 4  # and two gradients beside it, in the backward pass


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"quantization": "nf4", "gradient_checkpointing": True}, marks=pytest.mark.slow),
        {"quantization": "nf4", "optimizer": "adamw_8bit", "dtype": "float32", "padded": True},
        # The peak is in the optimizer's step.
        pytest.param({"r": None, "gradient_checkpointing": True, "sequence_length": 8}, marks=pytest.mark.slow),
        # With two and three layers the peak is at the logits, with more it is in the lowest layer's backward pass.
        pytest.param(
            {"r": None, "gradient_checkpointing": True, "optimizer": "adamw_torch_fused", "sequence_length": 32},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_and_three_layers_tell_of_any_number(changes, monkeypatch):
    """The extrapolation equals the whole model, every part to the byte."""
    arguments = {"r": 8, "batch_size": 2, "sequence_length": 48} | changes
    config = small_llama(14, vocab_size=1024)
    extrapolated = memory.estimate_training_memory(config, **arguments)
    monkeypatch.setattr(meta_step, "equal_layers", lambda config: False)
    assert memory.estimate_training_memory(config, **arguments) == extrapolated


def test_layers_that_differ_are_not_extrapolated(monkeypatch):
    assert meta_step.equal_layers(small_llama(5))
    assert not meta_step.equal_layers(small_llama(3))
    mixed = small_llama(5)
    mixed.layer_types = ["full_attention"] * 4 + ["sliding_attention"]
    assert not meta_step.equal_layers(mixed)
    build = meta_step.build_model

    def with_a_wider_layer(*arguments):
        model = build(*arguments)
        model.model.layers[4].mlp.up_proj = nn.Linear(64, 200, device="meta")
        return model

    monkeypatch.setattr(meta_step, "build_model", with_a_wider_layer)
    assert not meta_step.equal_layers(small_llama(5))


def test_numbers_computed_by_hand_for_llama_2_7b():
    """6,738,415,616 parameters; rank 8 on q and v: 32 layers of 2 * 8 * (4096 + 4096)."""
    arguments = {"r": 8, "target_modules": ["q_proj", "v_proj"], "batch_size": 1, "sequence_length": 16}
    plain = memory.estimate_training_memory(LLAMA_2_7B, **arguments)
    assert 0 <= plain.weights - 2 * 6_738_415_616 < 2048  # the rest: rotary frequencies
    assert plain.adapters == plain.gradients == 4 * 4_194_304
    assert plain.optimizer_state == 2 * plain.adapters
    four_bit = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    for double_quant, bits, books in ((True, 8 + 32 / 256, (16 + 1 + 256) * 4), (False, 32, 16 * 4)):
        nf4 = memory.estimate_training_memory(LLAMA_2_7B, quantization="nf4", double_quant=double_quant, **arguments)
        assert 0 <= nf4.weights - (four_bit // 2 + 4 * (6_738_415_616 - four_bit)) < 2048
        assert nf4.quantization_constants == four_bit // 64 * bits / 8 + 32 * 7 * books


@pytest.mark.slow
@pytest.mark.parametrize("double_quant", [True, False])
def test_constants_are_those_that_bitsandbytes_stores(double_quant):
    quantized = nn.ModuleList()
    for module in [m for m in load_base("tiny").modules() if isinstance(m, nn.Linear) and m.out_features != 768]:
        size = (module.in_features, module.out_features)
        quantized.append(bnb.nn.Linear4bit(*size, bias=False, compress_statistics=double_quant, quant_type="nf4"))
    stored_constants = stored(quantization_tensors(quantized.to("cpu")))
    arguments = {"r": 2, "quantization": "nf4", "double_quant": double_quant, "batch_size": 1, "sequence_length": 4}
    assert memory.estimate_training_memory(tiny_config(), **arguments).quantization_constants == stored_constants


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adamw_torch", torch.optim.AdamW),
        pytest.param("adamw_torch_fused", torch.optim.AdamW, marks=pytest.mark.slow),
        pytest.param("adamw_8bit", bnb.optim.AdamW8bit, marks=pytest.mark.slow),
        pytest.param("adamw_bnb_8bit", bnb.optim.AdamW8bit, marks=pytest.mark.slow),
        ("paged_adamw_8bit", bnb.optim.PagedAdamW8bit),
        ("paged_adamw_32bit", bnb.optim.PagedAdamW32bit),
        pytest.param("sgd", torch.optim.SGD, marks=pytest.mark.slow),
    ],
)
def test_optimizer_state_is_the_real_one(name, kind):
    model = real_model("tiny", r=24)  # of its matrices, some are below 4096 elements and some are above
    state = static_bytes(model, optimizer_after_a_step(model, kind))["optimizer_state"]
    estimate = memory.estimate_training_memory(tiny_config(), r=24, optimizer=name, batch_size=1, sequence_length=8)
    assert estimate.optimizer_state == state
    assert (state < 2 * estimate.adapters) == (name == "sgd" or name.endswith("8bit"))


def test_gpt_2_s_linear_layers_are_quantized_too(tmp_path):
    """They are Conv1D, with the weight the other way round; what bitsandbytes and PEFT really keep is the measure."""
    config = GPT2Config(vocab_size=768, n_embd=128, n_layer=3, n_head=4, n_positions=128, eos_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    real = prepare_model_for_kbit_training(load_base(str(tmp_path), quantization="nf4", dtype=torch.float32))
    estimate = memory.estimate_training_memory(
        config, r=4, quantization="nf4", dtype="float32", batch_size=1, sequence_length=16, device="cpu"
    )
    assert estimate.weights == sum(tensor.nbytes for tensor in (*real.parameters(), *real.buffers())) == 774_656


def test_adamw_on_cuda_makes_a_copy_of_the_state_where_the_fused_one_does_not():
    """torch's foreach AdamW takes the square roots of all second moments at once (`_foreach_sqrt`)."""
    arguments = {"r": None, "dtype": "float32", "batch_size": 1, "sequence_length": 4}
    plain, fused = (
        memory.estimate_training_memory(small_llama(), optimizer=name, **arguments)
        for name in ("adamw_torch", "adamw_torch_fused")
    )
    assert plain.static == fused.static
    assert plain.total == pytest.approx(plain.static + 2 * plain.gradients, rel=1e-4)
    assert fused.total == pytest.approx(fused.static + fused.gradients, rel=0.01)


@pytest.mark.slow
@settings(max_examples=2, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(r=st.sampled_from([4, 16]), rows=st.integers(1, 4), tokens=st.integers(2, 64), nf4=st.booleans())
def test_more_never_needs_less(r, rows, tokens, nf4):
    def estimate(layers=2, **changes):
        arguments = {"r": r, "batch_size": rows, "sequence_length": tokens, "quantization": "nf4" if nf4 else None}
        return memory.estimate_training_memory(small_llama(layers), **(arguments | changes))

    one = estimate()
    for more in ({"layers": 3}, {"r": r + 4}, {"batch_size": rows + 1}, {"sequence_length": tokens + 8}):
        assert estimate(**more).total >= one.total
    assert estimate(gradient_checkpointing=True).activations <= one.activations
    assert estimate(gradient_checkpointing=True, padded=True).total >= estimate(gradient_checkpointing=True).total


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": "int8"}, "quantization='int8'"),
        ({"dtype": "float64"}, "dtype='float64'.*bfloat16"),
        ({"optimizer": "adafactor"}, "optimizer='adafactor'.*paged_adamw_8bit"),
        ({"device": "mps"}, "device='mps'"),
        ({"r": 0}, "r=0.*None for no adapter"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"sequence_length": 0}, "sequence_length=0"),
        ({"r": None, "quantization": "nf4"}, "r=None"),
        ({"target_modules": ["query"]}, "query"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        memory.estimate_training_memory(small_llama(2), **({"r": 8, "batch_size": 1, "sequence_length": 8} | changes))


def test_a_model_that_cannot_run_without_data_is_refused(monkeypatch):
    """Such as Mixtral's, up to torch 2.13."""

    def asks_for_data(*_):
        return torch.ones(1, device="meta").item()

    monkeypatch.setattr(meta_step, "trace_step", asks_for_data)
    with pytest.raises(ValueError, match=r"config: a llama model cannot run on the meta device: .*meta"):
        memory.estimate_training_memory(small_llama(2), r=4, batch_size=1, sequence_length=8)


def test_nothing_is_left_behind():
    config, linear = small_llama(2), nn.functional.linear
    as_it_was = config.to_dict()
    memory.estimate_training_memory(config, r=8, quantization="nf4", batch_size=1, sequence_length=8)
    assert nn.functional.linear is linear
    assert not torch.is_autocast_enabled("cuda")
    assert {code.device.type for code in bnb.functional.name2qmap.values()} == {"cpu"}  # one without data would stay
    assert config.to_dict() == as_it_was


def test_measuring_adds_up_what_is_alive(capfd):
    before = torch.ones(1000)
    with memory.measure_peak_memory("cpu") as measured:
        first = torch.ones(1_000_000)
        second = first + 1
        del first
        third = second.to(torch.float16)
        assert measured.peak is None
    assert measured.peak == pytest.approx(8_000_000, abs=64)  # the number 1 becomes a tensor as well
    assert before.numel() == 1000
    assert third.numel() == 1_000_000
    assert capfd.readouterr().err == ""


def test_one_region_at_a_time_and_an_error_ends_it():
    with memory.measure_peak_memory("cpu") as outer:
        with pytest.raises(RuntimeError, match="one region at a time"), memory.measure_peak_memory("cpu"):
            pass
        _ = torch.ones(500)
    assert outer.peak == 2000
    with pytest.raises(KeyError), memory.measure_peak_memory("cpu") as failed:
        raise KeyError
    assert failed.peak is None
    with profile(), pytest.raises(RuntimeError, match="profiled already"), memory.measure_peak_memory("cpu"):
        pass
    with memory.measure_peak_memory("cpu") as again:
        _ = torch.ones(700)
    assert again.peak == 2800


def test_the_device_is_the_profile_s(monkeypatch):
    monkeypatch.setenv("LORA_LAB_DEVICE", "cpu")
    with memory.measure_peak_memory() as measured:
        _ = torch.ones(500)
    assert measured.peak == 2000
    with pytest.raises(ValueError, match="meta"), memory.measure_peak_memory("meta"):
        pass


@pytest.mark.cuda
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_predicted_and_measured_agree_on_cuda(quantization, checkpointing, padded, smollm2):
    """In the profile's format, under autocast where it is half precision, after a step that made cuBLAS's workspace."""
    dtype = torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    name = str(dtype).removeprefix("torch.")
    options = {"quantization": quantization, "checkpointing": checkpointing}
    model = real_model("smollm2-135m", r=8, dtype=name, device="cuda", **options)
    optimizer = optimizer_after_a_step(model)
    inputs = batch(4, 256, padded, "cuda")
    measured_peak(model, optimizer, inputs, dtype)
    peak = measured_peak(model, optimizer, inputs, dtype)
    estimate = memory.estimate_training_memory(
        AutoConfig.from_pretrained(smollm2),
        r=8,
        quantization=quantization,
        dtype=name,
        batch_size=4,
        sequence_length=256,
        gradient_checkpointing=checkpointing,
        padded=padded,
    )
    static = sum(static_bytes(model, optimizer).values())
    print(f"{quantization} {checkpointing} {padded} {estimate.total:,} {static + peak:,}")
    assert estimate.static == pytest.approx(static, rel=0.001)
    assert estimate.total == pytest.approx(static + peak, rel=0.03)


@pytest.mark.cuda
def test_measuring_on_cuda_reads_the_allocator():
    before = torch.ones(1_000_000, device="cuda")
    with memory.measure_peak_memory("cuda") as measured:
        first = torch.ones(2**20, device="cuda")
        second = first + 1
        del first, second
    assert measured.peak == 2 * 2**22
    assert before.is_cuda
