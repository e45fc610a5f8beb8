import copy
import random
import re
import shutil
import warnings
from functools import partial

from helpers.data import encode
from helpers.diagnose import diagnose, gradient_report
from helpers.lora import inject_lora

import bitsandbytes.functional
import pytest
import torch
from datasets import Dataset
from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    RandLoraConfig,
    VeraConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from safetensors.torch import load_file, save_file
from shared import llama, same
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    MixtralConfig,
    PreTrainedTokenizerFast,
    T5Config,
    get_linear_schedule_with_warmup,
)

EOS = 2
LAYERS = "base_model.model.model.layers"


def lora(**options):
    return LoraConfig(**({"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | options))


def peft(dtype=torch.float32, **options):
    return get_peft_model(llama(dtype), lora(**options)).train()


def adamw(model, lr=1e-3):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def make_batch(pad=0):
    """Three rows: a prompt, a completion, EOS, padding; the prompt and the padding are masked."""
    batch = {key: torch.full((3, 9), fill) for key, fill in (("input_ids", pad), ("labels", -100))}
    batch["attention_mask"] = torch.zeros(3, 9, dtype=torch.int64)
    for i, length in enumerate((9, 7, 6)):
        ids = torch.randint(3, 128, (length,), generator=torch.Generator().manual_seed(i))
        ids[-1] = EOS
        batch["input_ids"][i, :length] = ids
        batch["attention_mask"][i, :length] = 1
        batch["labels"][i, 2:length] = ids[2:]
    return batch


def step(model, optimizer, times=1, **options):
    for _ in range(times):
        model(**make_batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad(**options)


def codes(*arguments):
    return [finding.code for finding in diagnose(*arguments)]


def only(findings, code):
    """Return the finding if it is the only one and has this code; the message and the remedy must be one sentence."""
    assert [finding.code for finding in findings] == [code]
    finding = findings[0]
    assert finding.remedy.endswith(".")
    assert finding.remedy.count(". ") == 0
    assert not finding.message.endswith(".")
    return finding


@pytest.fixture(scope="module")
def nf4(tmp_path_factory):
    """A function that loads a small random model in NF4."""
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    settings = {"quant_type": "nf4", "use_double_quant": True, "compute_dtype": torch.float32}
    config = BitsAndBytesConfig(load_in_4bit=True, **{f"bnb_4bit_{name}": value for name, value in settings.items()})
    return lambda: AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"})


@pytest.fixture(scope="module")
def tokenizer():
    """A word-level tokenizer that ends each text with </s>, which is its padding token too."""
    vocabulary = {"<s>": 1, "</s>": EOS, "<unk>": 3} | {word: 10 + i for i, word in enumerate("abcdef")}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


# The report


def test_report_names_the_state_of_every_parameter():
    model = peft()
    assert gradient_report(model)["state"].isin(["frozen", "no gradient"]).all()
    model(**make_batch()).loss.backward()
    weights = dict(model.named_parameters())
    up, down = (f"{LAYERS}.0.mlp.down_proj.lora_{half}.default.weight" for half in "BA")
    weights[f"{LAYERS}.1.mlp.down_proj.lora_B.default.weight"].grad[0, 0] = float("inf")
    report = gradient_report(model)
    assert list(report.columns) == ["name", "requires_grad", "state", "norm"]
    assert list(report["name"]) == list(weights)
    report = report.set_index("name")
    assert report["requires_grad"].equals(report["state"] != "frozen")
    assert list(report.loc[[down, up], "state"]) == ["zero", "ok"]
    assert list(report.loc[[down, up], "norm"]) == [0, pytest.approx(weights[up].grad.pow(2).sum().sqrt().item())]
    assert report.loc[f"{LAYERS}.1.mlp.down_proj.lora_B.default.weight", "state"] == "non-finite"
    assert report[report["state"] == "frozen"]["norm"].isna().all()
    assert report.attrs == {}


def test_report_tells_tiny_and_low_precision_gradients_from_zero():
    tiny, low = torch.nn.Linear(4, 1, bias=False), torch.nn.Linear(2, 1, bias=False, dtype=torch.float16)
    tiny.weight.grad = torch.full((1, 4), 1e-30)  # its square underflows
    low.weight.grad = torch.full((1, 2), 6e4, dtype=torch.float16)  # its norm overflows fp16
    assert gradient_report(tiny)["state"].item() == "ok"
    assert gradient_report(low)["state"].item() == "ok"
    assert gradient_report(low)["norm"].item() == pytest.approx(6e4 * 2**0.5, rel=1e-3)


# Healthy runs


def full():
    return llama().train()


def checkpointed():
    model = llama()
    model.gradient_checkpointing_enable()
    return get_peft_model(model, lora()).train()


def with_biases(bias):
    return get_peft_model(llama(attention_bias=True), lora(bias=bias)).train()


def tied():
    options = {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    return get_peft_model(llama(tie_word_embeddings=True), lora(**options)).train()


def from_scratch():
    return inject_lora(llama(), ["q_proj", "down_proj"], r=4, lora_alpha=8).train()


def added(dtype=torch.float32, **options):
    model = llama(dtype)
    model.add_adapter(lora(**options))
    return model.train()


HEALTHY = {
    "lora": peft,
    "lora on bf16": lambda: peft(torch.bfloat16),
    "pissa": lambda: peft(init_lora_weights="pissa"),
    "random init": lambda: peft(init_lora_weights=False),
    "dora, all linear": lambda: peft(use_dora=True, target_modules="all-linear", lora_dropout=0.1),
    "regular expression": lambda: peft(target_modules=r".*\.0\..*q_proj"),
    "modules to save": lambda: peft(modules_to_save=["lm_head"]),
    "new tokens": lambda: peft(trainable_token_indices=[5, 6, EOS]),
    "biases": lambda: with_biases("lora_only"),
    "embeddings": lambda: peft(target_modules=["embed_tokens", "q_proj"]),  # PEFT starts lora_embedding_A at zero
    "tied embeddings": tied,
    "checkpointing": checkpointed,
    "eval mode": lambda: peft().eval(),
    "add_adapter in fp32": added,
    "LoRALinear": from_scratch,
    "full": full,
    "full in bf16": lambda: llama(torch.bfloat16).train(),
}


@pytest.mark.parametrize("build", HEALTHY.values(), ids=HEALTHY)
def test_healthy_runs_have_no_finding(build):
    model, batch = build(), make_batch()
    optimizer = adamw(model)
    assert diagnose(model, batch, optimizer) == []
    step(model, optimizer, times=2)
    assert diagnose(model, batch, optimizer) == []
    model(**batch).loss.backward()
    assert diagnose(model, None, optimizer) == []
    optimizer.zero_grad(set_to_none=False)
    assert diagnose(model, batch, optimizer) == []
    assert diagnose(model, None, optimizer) == []


def test_healthy_qlora_has_no_finding(nf4):
    for prepare in (lambda model: model, prepare_model_for_kbit_training):
        model = get_peft_model(prepare(nf4()), lora(target_modules="all-linear")).train()
        optimizer = adamw(model)
        assert diagnose(model, make_batch(), optimizer) == []
        step(model, optimizer, times=2)
        assert diagnose(model, make_batch(), optimizer) == []


# Faults, each made the way it happens


def trains(model, part):
    """Unfreeze every parameter with this in its name."""
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.requires_grad_(True)
    return model


def optimizer_before_the_adapter():
    base = llama()
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-3)
    return get_peft_model(base, lora()).train(), None, optimizer


def adamw_of_halves(model, of_b):
    a, b = ([p for n, p in model.named_parameters() if f"lora_{half}" in n] for half in "AB")
    return model, make_batch(), torch.optim.AdamW([{"params": a}, {"params": b, "lr": of_b}], lr=1e-3)


def schedule_without_a_warm_up():
    model = peft()
    optimizer = adamw(model, lr=0.0)
    get_linear_schedule_with_warmup(optimizer, 2, 10)
    return model, make_batch(), optimizer


def partly_in_eval_mode(part):
    model = checkpointed()
    model.get_submodule(part).eval()
    return model, make_batch()


def with_gradients(factor, *batch):
    model = peft()
    (model(**make_batch()).loss * factor).backward()
    return model, *batch


def frozen_after_a_backward_pass():
    model = full()
    model(**make_batch()).loss.backward()
    model.zero_grad(set_to_none=False)
    model.model.embed_tokens.requires_grad_(False)  # AdamW still decays it
    return model, make_batch()


def diverged():
    model = peft()
    step(model, adamw(model, lr=1e25), times=3)
    return model, make_batch(), adamw(model)


def second_adapter():
    model = peft()
    model.add_adapter("second", lora(target_modules=["q_porj", "v_proj", "layers.0.self_attn.k_proj", "proj"]))
    model.set_adapter("second")
    return (model,)


def without_a_graph():
    base = llama()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model, batch = get_peft_model(base, lora()).train(), make_batch()
    assert diagnose(model, batch) == []
    batch["inputs_embeds"] = base.get_input_embeddings()(batch.pop("input_ids")).detach()
    return model, batch


def dead(part, value):
    """An adapter of which one half or both are frozen or zero."""
    model = peft()
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.requires_grad_(value)
            torch.nn.init.zeros_(parameter)
    return model.eval(), make_batch()  # looked at as it will be in train mode


def changed(**tensors):
    """The healthy batch with tensors replaced by functions of it."""
    batch = make_batch()
    return batch | {key: change(batch) for key, change in tensors.items()}


def moved(batch):
    """Labels as nanoGPT's data sets have them: each is the token that follows."""
    return torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)


def other_eos(eos):
    model = peft()
    model.generation_config.eos_token_id = eos
    return model


def cut_rows(batch):
    """The second and third row have lost their last two tokens."""
    labels = batch["labels"].clone()
    for row, length in ((1, 7), (2, 6)):
        batch["attention_mask"][row, length - 2 :] = 0
        labels[row, length - 2 :] = -100
    return labels


def two_adapters(inference):
    model = peft()
    model.add_adapter("second", lora())
    if inference:  # made for inference, and trains: peft#3580
        model.peft_config["default"].inference_mode = True
        model.peft_config["second"].inference_mode = True
    return (model,)


def new_token():
    """A label whose embedding is what `resize_token_embeddings` makes."""
    base = llama()
    with torch.no_grad():
        base.get_input_embeddings().weight[int(make_batch()["input_ids"][0, 3])] = (
            base.get_input_embeddings().weight.mean(0)
        )
    return get_peft_model(base, lora()).train(), make_batch()


def settings(**options):
    return (peft(**options), make_batch())


WRONG = ["q_proj", "v_porj", "j_proj"]
REGEX = r".*\.(self_attn\.(q_proj|query)|mlp\.down_proj)|.*fc1"
FAULTS = [
    ("base-trainable", "base_model.model.lm_head.weight", lambda: (trains(peft(), "lm_head"), make_batch())),
    ("base-trainable", f": model.embed_tokens.weight, .*and {len(list(llama().parameters())) - 3} more",
     lambda: (trains(from_scratch(), ""), make_batch())),
    ("base-trainable", ".bias", lambda: (trains(with_biases("none"), ".bias"),)),
    ("low-precision-adapter", "torch.bfloat16", lambda: (added(torch.bfloat16),)),
    ("low-precision-adapter", "torch.float16", lambda: (added(torch.float16),)),
    ("partial-targets", ": j_proj, v_porj$", lambda: (peft(target_modules=WRONG), make_batch())),
    ("partial-targets", ": j_proj, v_porj$", lambda: (added(target_modules=WRONG), make_batch())),
    ("partial-targets", ": proj, q_porj$", second_adapter),
    ("checkpointing-inactive", f"{LAYERS}.0", lambda: partly_in_eval_mode("")),
    ("checkpointing-inactive", f"{LAYERS}.0", lambda: partly_in_eval_mode(LAYERS)),  # to switch dropout off
    ("not-in-optimizer", "layers.0.self_attn.q_proj.lora_A.default.weight.*and 5 more", optimizer_before_the_adapter),
    ("lr-zero", "lora_A", lambda: ((model := peft()), make_batch(), adamw(model, lr=0.0))),
    ("lr-zero", "^((?!lora_A).)*lora_B((?!lora_A).)*$", lambda: adamw_of_halves(peft(), 0.0)),
    ("lr-zero", "lora_A", schedule_without_a_warm_up),
    ("leftover-gradients", "lora_B", lambda: with_gradients(1 / 4, make_batch())),  # a dropped tail of a window
    ("leftover-gradients", " model.embed_tokens.weight$", frozen_after_a_backward_pass),
    ("no-gradient", "and 5 more", without_a_graph),
    ("zero-gradient", "lora_B", lambda: (peft(lora_alpha=0).eval(), make_batch())),
    ("zero-gradient", "lora_B", lambda: (peft(lora_dropout=1.0).eval(), make_batch())),
    ("zero-gradient", "lora_A.*lora_B", lambda: dead("lora_A", True)),
    ("zero-gradient", "lora_A", lambda: dead("lora_B", False)),
    ("non-finite-gradient", "lora_B", lambda: with_gradients(1e39)),
    ("non-finite-gradient", "", diverged),
    ("nested-adapter", "2 times", lambda: (get_peft_model(peft(), lora()).train(), make_batch())),
    ("idle-adapter", "of 2 adapters, 'second', the last, is frozen", lambda: two_adapters(False)),
    ("idle-adapter", "'default' was loaded for inference, and trains", lambda: two_adapters(True)),
    ("tied-target", "lm_head.base_layer.weight", lambda: (
        get_peft_model(llama(tie_word_embeddings=True), lora(target_modules=["q_proj", "lm_head"])).train(),)),
    ("unmatched-settings", "target_modules '.*fc1', target_modules 'query'$", lambda: settings(target_modules=REGEX)),
    ("unmatched-settings", "rank_pattern 'query'$", lambda: settings(rank_pattern={"query": 8, "q_proj": 2})),
    ("unmatched-settings", "alpha_pattern '.q_proj'$", lambda: settings(alpha_pattern={"^q_proj": 8})),
    ("unmatched-settings", "rank_pattern 'base_model", lambda: settings(
        rank_pattern={f"{LAYERS}.0.self_attn.q_proj": 8})),
    ("unmatched-settings", "rank_pattern 'layers.0.self_attn.q_proj'$", lambda: settings(  # an earlier one takes it
        rank_pattern={"q_proj": 2, "layers.0.self_attn.q_proj": 8})),
    ("unmatched-settings", "exclude_modules 'lm_haed'$", lambda: settings(exclude_modules=["lm_haed", "lm_head"])),
    ("unmatched-settings", "exclude_modules '.*fc.*'$", lambda: settings(exclude_modules=".*fc.*")),
    ("unmatched-settings", "layers_to_transform 31$", lambda: settings(
        layers_to_transform=[0, 31], layers_pattern="layers")),
    ("unmatched-settings", "modules_to_save 'score'$", lambda: settings(modules_to_save=["score"])),
    ("rows-without-labels", "2 of 3 rows of the batch have no label: 0, 2$", lambda: (
        peft(), changed(labels=lambda batch: batch["labels"].index_fill(0, torch.tensor([0, 2]), -100)))),
    ("shifted-labels", "are not the token at their place, and", lambda: (peft(), changed(labels=moved))),
    ("shifted-labels", "", lambda: (peft(), {  # one row, as in LLMs-from-scratch
        "input_ids": make_batch()["input_ids"][:1, :-1], "labels": make_batch()["input_ids"][:1, 1:]})),
    ("mismatched-labels", "1 labels are another token", lambda: (
        peft(), changed(labels=lambda batch: batch["labels"].where(batch["labels"] != batch["labels"][0, 4], 9)))),
    ("padding-as-labels", "5 labels are padding", lambda: (
        peft(), changed(labels=lambda batch: batch["input_ids"].clone()))),
    ("eos-of-two-minds", "end with token 2, and .*config's eos_token_id is 2, .*generation_config's eos_token_id is 7$",
     lambda: (other_eos(7), make_batch())),
    ("eos-of-two-minds", "generation_config's eos_token_id is None$", lambda: (other_eos(None), make_batch())),
    ("completion-cut", "^2 of 3 completions end without EOS$", lambda: (peft(), changed(labels=cut_rows))),
    ("untrained-tokens", "tokens [0-9]+$", new_token),
]  # fmt: skip


@pytest.mark.parametrize(("code", "said", "build"), FAULTS, ids=[f"{i}-{code}" for i, (code, *_) in enumerate(FAULTS)])
def test_a_fault_is_found_and_no_other(code, said, build):
    assert re.search(said, only(diagnose(*build()), code).message)


def test_a_fault_that_was_mended_is_no_finding():
    model = added(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    assert diagnose(model) == []
    assert diagnose(partly_in_eval_mode(LAYERS)[0].train(), make_batch()) == []
    assert "partial-targets" not in codes(second_adapter()[0].merge_and_unload())  # there is no adapter left
    assert diagnose(*with_gradients(1 / 4)) == []


@pytest.mark.parametrize("regex", [
    r"(?!.*lm_head|.*layers\.9).*q_proj", r".*\.(?:q_proj|v_proj)", r".*\.(?P<which>q_proj|nothing)", r".*[qv]_proj",
    r"(?i).*Q_PROJ", r"(?i).*Q_PROJ|.*V_PROJ",
])  # fmt: skip
def test_regular_expressions_of_every_kind_are_read(regex):
    assert diagnose(peft(target_modules=regex)) == []


def test_experts_that_the_router_passed_over_are_no_fault():
    class Routed(torch.nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.experts = torch.nn.ModuleList(copy.deepcopy(mlp) for _ in range(3))

        def forward(self, x):
            return self.experts[1](x)

    base = llama()
    for layer in base.model.layers:
        layer.mlp = Routed(layer.mlp)
    model = get_peft_model(base, lora(target_modules=["down_proj"])).train()
    assert diagnose(model, make_batch()) == []
    for layer in model.get_decoder().layers:  # now none of them is used
        layer.mlp.forward = lambda x: x * 1.0
    only(diagnose(model, make_batch()), "no-gradient")


@pytest.mark.parametrize("config", [
    VeraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), LoHaConfig(r=4, target_modules=["q_proj"]),
    LoKrConfig(r=4, target_modules=["q_proj"]), RandLoraConfig(r=4, target_modules=["q_proj"]),
], ids=lambda config: type(config).__name__)  # fmt: skip
def test_parts_of_other_methods_wait_for_the_part_that_is_zero(config):
    model = get_peft_model(llama(), config).train()
    assert diagnose(model, make_batch()) == []
    for layer in model.get_decoder().layers:
        layer.self_attn.forward = lambda hidden_states, **options: (hidden_states * 1.0, None)
    assert "no-gradient" in codes(model, make_batch())


@pytest.mark.parametrize("experts", [None, ["experts.gate_up_proj", "experts.down_proj"], ["experts.w1"]])
def test_parameters_of_experts_are_targets_too(experts):
    config = MixtralConfig(vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=1, eos_token_id=EOS,
                           num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)  # fmt: skip
    targets = {"target_modules": "all-linear"}
    if experts:
        targets = {"target_modules": ["q_proj"], "target_parameters": experts}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_config(config), lora(**targets)).train()
    found = [finding.message for finding in diagnose(model, make_batch())]
    assert found == (["a setting matched nothing: target_parameters 'experts.w1'"] if experts == ["experts.w1"] else [])


def test_an_adapter_s_file_that_gave_nothing_to_the_model(tmp_path):
    model, optimizer = (built := peft()), adamw(built, lr=0.1)
    step(model, optimizer, 2)
    model.save_pretrained(tmp_path / "good", save_embedding_layers=False)
    tensors = load_file(tmp_path / "good" / "adapter_model.safetensors")
    renamed = {name.replace("model.layers", "model.language_model.layers"): tensor for name, tensor in tensors.items()}
    zero = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    fresh = {name: zero[name] if "lora_B" in name else tensor for name, tensor in tensors.items()}
    for name, content, said in (
        ("good", tensors, ""), ("empty", {}, "has 0 tensors"), ("zero", zero, "and no update in them"),
        ("fresh", fresh, "and no update in them"),
        ("renamed", renamed, "names that are not in the model: .*language_model"),
    ):  # fmt: skip
        if name != "good":
            shutil.copytree(tmp_path / "good", tmp_path / name)
        save_file(content, tmp_path / name / "adapter_model.safetensors", metadata={"format": "pt"})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = PeftModel.from_pretrained(llama(), tmp_path / name, is_trainable=True)
        found = diagnose(loaded.train(), adapter=tmp_path / name)
        assert re.search(said, only(found, "adapter-not-loaded").message) if said else found == []


def test_an_adapter_of_another_name_and_one_on_the_embedding_are_loaded(tmp_path):
    """In the embedding's adapter it is A that begins as zero."""
    for name, options in (("tickets", {}), ("default", {"target_modules": ["embed_tokens"]})):
        model = get_peft_model(llama(), lora(**options), adapter_name=name)
        step(model.train(), adamw(model, lr=0.1), 2)
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
        folder = next((tmp_path / name).rglob("adapter_model.safetensors")).parent
        loaded = PeftModel.from_pretrained(llama(), folder, adapter_name=name, is_trainable=True)
        assert diagnose(loaded.train(), adapter=folder) == []


def test_healthy_ends_of_completions():
    plain = changed(labels=lambda batch: batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100))
    plain["input_ids"][plain["input_ids"] == EOS] = 5  # texts without an end, nothing masked: as in pretraining
    plain["labels"][plain["labels"] == EOS] = 5
    assert diagnose(peft(), plain) == []
    after = changed()  # a chat template's line break after the end of turn, not learned, or learned
    for learned in (True, False):
        after["input_ids"][:, -2:] = torch.tensor([EOS, 9])
        after["attention_mask"][:] = 1
        after["labels"] = after["input_ids"].clone()
        after["labels"][:, :2] = -100
        after["labels"][:, -1] = 9 if learned else -100
        assert diagnose(peft(), after) == []


def test_labels_of_an_encoder_decoder_are_other_tokens():
    model = AutoModelForSeq2SeqLM.from_config(
        T5Config(vocab_size=128, d_model=32, d_ff=32, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    batch = changed(labels=lambda batch: batch["input_ids"].flip(1))
    assert {"shifted-labels", "mismatched-labels"}.isdisjoint(codes(model.train(), batch))


def test_adapter_loaded_for_inference(tmp_path):
    peft().save_pretrained(tmp_path)
    base = llama()
    base.gradient_checkpointing_enable()
    base.enable_input_require_grads()  # the loss then requires a gradient, and backward runs without an error
    model = PeftModel.from_pretrained(base, tmp_path).train()
    model(**make_batch()).loss.backward()
    only(diagnose(model, make_batch()), "no-trainable-parameters")
    assert codes(PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).train(), make_batch()) == []


def test_prepared_for_kbit_training_too_late(nf4):
    model = prepare_model_for_kbit_training(get_peft_model(nf4(), lora())).train()
    only(diagnose(model), "no-trainable-parameters")
    only(diagnose(model, make_batch()), "no-trainable-parameters")


def test_weights_packed_for_inference(nf4):
    pack = getattr(bitsandbytes.functional, "_convert_weight_packed_for_cpu", None)
    if pack is None:
        pytest.skip("this version of bitsandbytes does not repack weights")
    model = get_peft_model(nf4(), lora()).train()
    name = f"{LAYERS}.1.self_attn.k_proj.weight"  # no target of this adapter
    weight = model.get_parameter(name)
    weight.data, weight.quant_state = pack(weight.data, weight.quant_state)
    assert only(diagnose(model), "packed-for-inference").message.endswith(f": {name}")


def test_generation_before_training_on_a_cpu(nf4):
    model = get_peft_model(nf4(), lora(target_modules="all-linear"))
    layers = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    if not layers or not layers[0].support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes packs 4-bit weights on CPUs with AVX512-BF16 only")

    def gradient():
        model.train()(**make_batch()).loss.backward()
        found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        return found

    right = gradient()
    assert diagnose(model.eval(), make_batch()) == []  # and it did not pack the weights itself:
    assert torch.equal(gradient(), right)
    model.eval().generate(input_ids=make_batch()["input_ids"][:1, :4], max_new_tokens=2, do_sample=False)
    finding, *consequences = diagnose(model.train(), make_batch())
    assert finding.code == "packed-for-inference"
    assert "layers.0.self_attn.q_proj" in finding.message
    assert [consequence.code for consequence in consequences] == ["zero-gradient"]
    assert (gradient() - right).norm() > 0.3 * right.norm()
    model.state_dict()  # the remedy
    assert diagnose(model, make_batch()) == []
    assert (gradient() - right).norm() < 0.02 * right.norm()


def test_warm_up_that_is_never_stepped():
    model = peft()
    optimizer = adamw(model)
    scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=4, num_training_steps=8)
    assert diagnose(model, make_batch(), optimizer) == []
    step(model, optimizer)  # the first step of a warm-up, with a learning rate of 0
    assert diagnose(model, make_batch(), optimizer) == []
    step(model, optimizer)
    only(diagnose(model, make_batch(), optimizer), "lr-zero")
    scheduler.step()
    assert diagnose(model, make_batch(), optimizer) == []


def test_prompts_that_fill_max_length(tokenizer):
    rows = [{"input_ids": [*range(10, 22), EOS], "labels": [-100] * 10 + [20, 21, EOS]} for _ in range(2)]
    cut = [{key: values[:10] for key, values in row.items()} for row in rows]
    batches = [{key: torch.tensor([row[key] for row in part]) for key in part[0]} for part in (rows, cut)]
    assert diagnose(peft(), batches[0]) == []
    only(diagnose(peft(), batches[1]), "no-labels")
    batches[1]["labels"][:, 0] = 5  # the first label is never predicted
    only(diagnose(peft(), batches[1]), "no-labels")
    del batches[1]["labels"]
    assert "no 'labels'" in only(diagnose(peft(), batches[1]), "no-labels").message


def test_padding_with_the_eos_token(tokenizer):
    encoded = [tokenizer(text) for text in ("a b c d e", "b c", "e f a b")]
    assert encoded[1]["input_ids"][-1] == EOS
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)(encoded)
    finding = only(diagnose(peft(), batch), "eos-not-learned")
    assert finding.message.startswith("3 learned texts")
    del batch["attention_mask"]
    only(diagnose(peft(), batch), "eos-not-learned")
    model = peft()  # a chat model: its own end-of-turn token beside the config's
    model.config.eos_token_id, model.generation_config.eos_token_id = 7, [8, EOS]
    only(diagnose(model, batch), "eos-not-learned")
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    assert diagnose(model, batch) == []


def test_eos_that_need_not_be_learned(tokenizer):
    rows = Dataset.from_list([{"prompt": "a b", "completion": " c d e"}, {"prompt": "a", "completion": " f"}])
    batch = DataCollatorForSeq2Seq(tokenizer)(list(encode(rows, tokenizer)))
    assert (batch["input_ids"][1] == EOS).sum() == 4  # one learned, three of padding
    assert diagnose(peft(), batch) == []
    truncated = DataCollatorForSeq2Seq(tokenizer)(list(encode(rows, tokenizer, max_length=4)))
    truncated = {key: value[:1] for key, value in truncated.items()}
    assert only(diagnose(peft(), truncated), "completion-cut").message == "1 of 1 completions end without EOS"
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})  # the remedy
    encoded = [tokenizer(text) for text in ("a b c d e", "b c")]
    assert diagnose(peft(), DataCollatorForLanguageModeling(tokenizer, mlm=False)(encoded)) == []
    # Texts without EOS, padded with it: the padding is no end of a text, however it is masked.
    encoded = [{key: values[:-1] for key, values in row.items()} for row in encoded]
    tokenizer.pad_token = "</s>"
    assert diagnose(peft(), DataCollatorForLanguageModeling(tokenizer, mlm=False)(encoded)) == []


def test_reentrant_checkpointing_cuts_the_adapter_off():
    model = peft(modules_to_save=["lm_head"])
    model.config.use_cache = False
    for layer in model.get_decoder().layers:  # checkpointing by hand, without transformers' hook on the embedding
        layer.forward = checkpointed_by_hand(layer.forward)
    model(**make_batch()).loss.backward()  # no error: lm_head gets its gradient
    finding = only(diagnose(model), "no-gradient")
    model.zero_grad()
    assert diagnose(model, make_batch()) == [finding]
    assert "q_proj.lora_A" in finding.message
    assert "lm_head" not in finding.message
    assert "and 5 more" in finding.message
    model.enable_input_require_grads()
    assert diagnose(model, make_batch()) == []


def checkpointed_by_hand(forward):
    return lambda hidden, **options: checkpoint(partial(forward, **options), hidden, use_reentrant=True)


def test_several_faults_at_once_come_in_a_fixed_order():
    base = llama()
    optimizer = torch.optim.AdamW(base.parameters(), lr=0.0)
    model = get_peft_model(base, lora(lora_alpha=0, target_modules=["q_proj", "p_proj"]))
    base.gradient_checkpointing_enable()
    base.lm_head.weight.requires_grad_(True)
    model(**make_batch()).loss.backward()
    assert codes(model.eval(), make_batch(), optimizer) == [
        "base-trainable",
        "partial-targets",
        "checkpointing-inactive",
        "not-in-optimizer",
        "lr-zero",
        "leftover-gradients",
        "zero-gradient",
    ]


# Read-only


def snapshot(model, optimizer):
    return copy.deepcopy(
        {
            "state": model.state_dict(),
            "other buffers": dict(model.named_buffers()),
            "modes": {name: module.training for name, module in model.named_modules()},
            "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
            "optimizer": optimizer.state_dict(),
            "random": (torch.get_rng_state(), random.getstate()),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "grad mode": torch.is_grad_enabled(),
        }
    )


class Counting(torch.nn.Module):
    """Stands for modules with state, such as BatchNorm: it changes a buffer in place, and replaces another."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.register_buffer("calls", torch.zeros(3))
        self.register_buffer("last", torch.zeros(3), persistent=False)
        self.register_buffer("scale", torch.ones(1))  # backward needs it as it was in the forward pass

    def forward(self, *inputs, **options):
        self.calls += 1
        self.last = torch.ones(5)
        if self.calls[0] < 0:
            raise ArithmeticError("in the forward pass")
        return self.inner(*inputs, **options) * self.scale


@pytest.mark.parametrize("fails", [None, "forward", "backward"])
@pytest.mark.parametrize(
    "build", [lambda: peft(lora_dropout=0.3), full, checkpointed], ids=["lora", "full", "checkpointed"]
)
def test_leaves_everything_as_it_was(build, fails):
    model, batch = build(), make_batch()
    decoder = model.get_decoder()
    decoder.norm = Counting(decoder.norm)
    optimizer = adamw(model)
    step(model, optimizer)
    model(**batch).loss.backward()
    decoder.layers[0].mlp.eval()
    pending = model(**batch).loss  # its graph must stay usable
    if fails == "forward":
        decoder.norm.calls.fill_(-9)
    if fails == "backward":
        decoder.norm.register_full_backward_hook(lambda *_: 1 / 0)
    grads, buffers = [p.grad for p in model.parameters()], list(model.buffers())
    values, kept = copy.deepcopy(grads), copy.deepcopy(batch)
    with torch.set_grad_enabled(fails != "forward"):
        before = snapshot(model, optimizer)
        if fails:
            with pytest.raises(ArithmeticError):
                diagnose(model, batch, optimizer)
        else:
            assert "leftover-gradients" in codes(model, batch, optimizer)
        assert same(before, snapshot(model, optimizer))
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    assert all(buffer is old for buffer, old in zip(model.buffers(), buffers, strict=True))
    assert same(values, grads)
    assert same(batch, kept)
    if not fails:
        pending.backward()


def test_static_checks_run_no_pass():
    model = peft()
    model.forward = None
    assert diagnose(model) == []


def test_works_under_no_grad_and_on_models_without_a_config():
    with torch.no_grad():
        assert diagnose(peft(), make_batch()) == []
    assert diagnose(torch.nn.Linear(2, 2)) == []


@pytest.mark.cuda
def test_leaves_the_cuda_random_state_as_it_was():
    model = peft(lora_dropout=0.3).cuda()
    optimizer = adamw(model)
    before = snapshot(model, optimizer)
    assert diagnose(model, make_batch(), optimizer) == []
    assert same(before, snapshot(model, optimizer))
