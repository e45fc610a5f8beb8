"""What several test files build: a small Llama with random weights, and a short run of the Trainer on tiny."""

from helpers import data, training
from helpers.models import load_base, load_tokenizer

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, set_seed


def llama_config(**changes) -> LlamaConfig:
    """Two query heads for each key head, and an untied output layer: neither is so in tiny."""
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(**(sizes | heads | {"pad_token_id": 0, "eos_token_id": 2} | changes))


def llama(dtype: torch.dtype = torch.float32, **changes) -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(llama_config(**changes)).to(dtype)


def encoded(number: int, split: str = "train"):
    """The first rows of the sample task, with their prompts masked."""
    return data.encode(data.load_commands(split).select(range(number)), load_tokenizer("tiny"))


def adapter(**options) -> PeftModel:
    set_seed(0)
    return get_peft_model(load_base("tiny"), LoraConfig(**({"r": 4, "task_type": "CAUSAL_LM"} | options)))


def trainer(folder, model=None, rows: int = 2, held_out=None, callbacks=(), **settings) -> Trainer:
    """Return a Trainer over a few rows that has not started; by default it saves after each of two updates."""
    defaults = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 1}
    arguments = training.training_arguments(folder, **defaults | settings)
    model = adapter() if model is None else model
    tokenizer = load_tokenizer("tiny")
    return training.build_trainer(model, arguments, tokenizer, encoded(rows), held_out, callbacks=list(callbacks))


def result(trainer: Trainer) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The adapter's weights, named as without PEFT, and the logged losses."""
    weights = {name.removeprefix("base_model.model."): p for name, p in trainer.model.named_parameters()}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {name: p.detach().clone() for name, p in weights.items() if "lora_" in name}, losses


def same(one, two) -> bool:
    """Whether two nests of tensors, dicts, lists and plain values are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two
