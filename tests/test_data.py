"""The sample task, encoding and collating."""

import json

from helpers import data
from helpers.makers import sample_task
from helpers.models import load_tokenizer

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DataCollatorForSeq2Seq,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    set_seed,
)

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


def test_splits_have_their_sizes_and_no_duplicate():
    assert {split: len(data.load_commands(split)) for split in SPLITS} == {"train": 400, "validation": 60, "test": 120}
    prompts = [prompt for split in SPLITS for prompt in data.load_commands(split)["prompt"]]
    assert len(set(prompts)) == len(prompts)


def test_no_phrasing_and_no_pair_of_device_and_room_is_in_two_splits():
    for phrasings in (sample_task.SWITCH_PHRASINGS, sample_task.DIAL_PHRASINGS):
        every = [phrasing for split in SPLITS for phrasing in phrasings[split]]
        assert len(set(every)) == len(every)
    pairs = {split: set() for split in SPLITS}
    for split in SPLITS:
        for completion in data.load_commands(split)["completion"]:
            command = json.loads(completion)
            pairs[split].add((command["device"], command["room"]))
        assert pairs[split] <= set(sample_task.device_room_pairs(split))
    assert not pairs["train"] & pairs["test"]
    assert not pairs["train"] & pairs["validation"]
    assert not pairs["validation"] & pairs["test"]


@pytest.mark.parametrize("split", SPLITS)
def test_a_command_says_what_its_request_says(split):
    for row in data.load_commands(split):
        command = json.loads(row["completion"])
        request = row["prompt"].removesuffix("\nJSON:").lower()
        keys = ["device", "room", "action"] + (["value"] if command["action"] == "set" else [])
        assert list(command) == keys
        assert command["device"] in request
        assert command["room"] in request
        words = request.replace(".", " ").replace("?", " ").replace(",", " ").replace(":", " ").split()
        assert str(command["value"] if "value" in command else command["action"]) in words


@pytest.mark.parametrize("split", SPLITS)
def test_the_stored_rows_are_those_of_the_templates(split):
    assert data.load_commands(split).to_list() == sample_task.sample_rows(split)


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match=r"'dev' does not exist; choose one of train, validation, test"):
        data.load_commands("dev")


def test_encode_masks_the_prompt_and_keeps_the_eos(tokenizer):
    row = data.load_commands("train")[0]
    [encoded] = data.encode(data.load_commands("train").select([0]), tokenizer)
    prompt = tokenizer(row["prompt"]).input_ids
    completion = tokenizer(row["completion"]).input_ids
    assert encoded["input_ids"] == [*prompt, *completion, tokenizer.eos_token_id]
    assert encoded["labels"] == [-100] * len(prompt) + [*completion, tokenizer.eos_token_id]
    assert encoded["attention_mask"] == [1] * len(encoded["input_ids"])


def test_encode_truncates_and_refuses_a_row_without_labels(tokenizer):
    rows = data.load_commands("train").select(range(3))
    lengths = [len(tokenizer(prompt).input_ids) for prompt in rows["prompt"]]
    shorter = data.encode(rows, tokenizer, max_length=max(lengths) + 1)
    assert all(len(row["input_ids"]) == len(row["labels"]) <= max(lengths) + 1 for row in shorter)
    assert all(any(label != -100 for label in row["labels"]) for row in shorter)
    too_long = lengths.index(max(lengths)) + 1
    with pytest.raises(ValueError, match=rf"row {too_long}: the prompt alone has {max(lengths)} tokens and max_length"):
        data.encode(rows, tokenizer, max_length=max(lengths))


def test_rows_that_lost_their_end_are_counted(tokenizer):
    rows = data.load_commands("train")
    with pytest.warns(UserWarning, match=r"^131 of 400 rows have more than 40 tokens and lost their end, EOS included"):
        cut = data.encode(rows, tokenizer, max_length=40)
    assert sum(row["input_ids"][-1] != tokenizer.eos_token_id for row in cut) == 131
    with pytest.raises(ValueError, match=r"^row 1 and 399 more: the prompt alone"):
        data.encode(rows, tokenizer, max_length=5)


def sentencepiece(kind):
    """A tokenizer that adds a space before each text, as Llama 2's ("legacy"), before the first, or never."""
    texts = ["The lamp is on", "Yes of course", "No", " on", "The lamp:"]
    built = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    built.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    if kind == "legacy":
        built.pre_tokenizer = None
        built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    built.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def adds(tokenizer, single):
    """Have the tokenizer add special tokens to each text; "<s>" is a BOS, "<|end|>" or "</s>" an EOS."""
    names = [(token, tokenizer.convert_tokens_to_ids(token)) for token in single.split() if token != "$A"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=names)
    return tokenizer


@pytest.mark.parametrize("kind", ["legacy", "first", "never"])
def test_prompt_and_completion_are_the_tokens_of_the_whole_text(kind):
    tokenizer = adds(sentencepiece(kind), "<s> $A")
    [row] = data.encode(Dataset.from_list([{"prompt": "The lamp:", "completion": " on"}]), tokenizer)
    assert row["input_ids"] == [*tokenizer("The lamp: on").input_ids, tokenizer.eos_token_id]
    assert (
        tokenizer.decode([label for label in row["labels"] if label != -100], skip_special_tokens=True).strip() == "on"
    )


def test_a_space_that_tokenizing_apart_would_add_is_refused():
    rows = Dataset.from_list([{"prompt": "The lamp: ", "completion": "on"}])
    with pytest.raises(ValueError, match=r"^row 1: tokenized apart, .*begin the completion with it$"):
        data.encode(rows, adds(sentencepiece("legacy"), "<s> $A"))


def test_bos_comes_once_and_an_eos_that_the_tokenizer_adds_not_in_the_middle():
    rows = Dataset.from_list([{"prompt": "Say yes:", "completion": " yes"}])
    tokenizer = load_tokenizer("tiny")
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    plain = data.encode(rows, tokenizer)[0]
    [row] = data.encode(rows, adds(tokenizer, "<s> $A <|end|>"))
    assert row["input_ids"] == [tokenizer.bos_token_id, *plain["input_ids"]]
    assert row["labels"] == [-100, *plain["labels"]]
    rendered = Dataset.from_list([{"prompt": "<s>Say yes:", "completion": " yes"}])
    with pytest.raises(ValueError, match="row 1: the prompt begins with <s>, and the tokenizer adds another"):
        data.encode(rendered, tokenizer)


@pytest.mark.parametrize("config", [
    GPT2Config(vocab_size=800, n_embd=32, n_layer=2, n_head=2, n_positions=128),
    LlamaConfig(vocab_size=800, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2),
    BloomConfig(vocab_size=800, hidden_size=32, n_layer=2, n_head=2),
], ids=lambda config: config.model_type)  # fmt: skip
def test_fewer_logits_give_the_same_loss_with_every_kind_of_position(config, tokenizer):
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    rows = list(data.encode(data.load_commands("train").select(range(4)), tokenizer))
    few, whole = data.LogitsToKeepCollator(tokenizer)(rows), DataCollatorForSeq2Seq(tokenizer)(rows)
    loss = model(**few).loss
    assert loss.item() == pytest.approx(model(**whole).loss.item(), abs=1e-5)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert few["logits_to_keep"].numel() < whole["labels"].shape[1]


def test_encode_refuses_what_it_cannot_learn_from(tokenizer):
    rows = data.load_commands("train")
    with pytest.raises(ValueError, match="no column completion"):
        data.encode(rows.remove_columns("completion"), tokenizer)
    with pytest.raises(ValueError, match="empty"):
        data.encode(rows.select([]), tokenizer)
    without_eos = load_tokenizer("tiny")
    without_eos.eos_token = None
    with pytest.raises(ValueError, match="no EOS"):
        data.encode(rows, without_eos)
