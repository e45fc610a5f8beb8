"""Reading other people's files, splitting without leaks, and folders that are whole or not there."""

import contextlib
import gzip
import io
import json
import os
import re
import signal
import time
import unicodedata
import zipfile
from collections import Counter

from helpers.data import encode
from helpers.finetune.folders import atomic_folder
from helpers.finetune.own_data import MOST_CHARACTERS, load_examples, normalized, split_examples
from helpers.makers import own_sample
from helpers.models import load_base, load_tokenizer

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GOOD = b'{"prompt": "a", "completion": "b"}\n'


def _with_template(template):
    tokenizer = load_tokenizer("tiny")
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def chat_tokenizer():
    """tiny's tokenizer with a ChatML template, whose end of turn is the EOS, as in SmolLM2."""
    return _with_template(CHATML)


def _file(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    return path


def _chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


# what can be read


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.ndjson", "rows.JSONL"])
def test_jsonl_with_bom_blank_lines_windows_line_ends_and_white_space(tmp_path, name):
    content = (
        '\ufeff{"prompt": " é\u2028b ", "completion": "c\\n", "note": 1}\r\n\r\n{"completion": "d", "prompt": "e"}'
    )
    expected = [{"prompt": " é\u2028b ", "completion": "c\n"}, {"prompt": "e", "completion": "d"}]
    assert load_examples(_file(tmp_path, name, content.encode())).to_list() == expected


def test_csv_with_bom_quotes_line_breaks_and_other_columns(tmp_path):
    content = '\ufeffid, completion ,prompt\r\n1,b,"a ""x"",\r\ny"\r\n\r\n2,d, c\r\n'
    expected = [{"prompt": 'a "x",\r\ny', "completion": "b"}, {"prompt": " c", "completion": "d"}]
    assert load_examples(_file(tmp_path, "rows.csv", content.encode())).to_list() == expected


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", b"question,answer,note,note\na,b,,\nc,d,,\n"),
        ("rows.jsonl", b'{"question": "a", "answer": "b"}\n{"question": "c", "answer": "d"}'),
    ],
)
def test_columns_and_keys_of_other_names(tmp_path, name, content):
    rows = load_examples(_file(tmp_path, name, content), prompt="question", completion="answer")
    assert rows.to_list() == [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]


def test_a_dataset(chat_tokenizer):
    rows = [{"prompt": "a", "completion": "b", "id": 1}] * 2
    assert load_examples(Dataset.from_list(rows)).to_list() == [{"prompt": "a", "completion": "b"}] * 2
    chat = Dataset.from_list([{"messages": _chat(("user", "a"), ("assistant", "b"))}] * 2)
    assert load_examples(chat, chat_tokenizer)["completion"] == ["b", "b"]
    with pytest.raises(ValueError, match="the dataset, row 2: 'completion' is None"):
        load_examples(Dataset.from_list([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}]))


# chat messages: the tokens that the template gives, nothing doubled and nothing lost

CONVERSATIONS = [
    _chat(("user", "Turn it on."), ("assistant", "yes")),
    _chat(("system", "Be short."), ("user", "a"), ("assistant", "b"), ("user", "é 12\n"), ("assistant", '{"x": [1]}')),
]


def _write_chats(tmp_path):
    lines = "\n".join(json.dumps({"messages": messages}) for messages in CONVERSATIONS)
    return _file(tmp_path, "chat.jsonl", lines.encode())


def _check_tokens(path, tokenizer):
    for messages, row, encoded in zip(
        CONVERSATIONS, load_examples(path, tokenizer), encode(load_examples(path, tokenizer), tokenizer), strict=True
    ):
        whole = tokenizer.apply_chat_template(messages, return_dict=False)
        last = len(whole) - whole[::-1].index(tokenizer.eos_token_id)  # after the EOS comes the template's line break
        assert encoded["input_ids"] == whole[:last]
        assert encoded["input_ids"].count(tokenizer.eos_token_id) == whole.count(tokenizer.eos_token_id)
        before = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert encoded["labels"][len(before) :] == encoded["input_ids"][len(before) :]
        learned = [label for label in encoded["labels"] if label != -100]
        said = [message["content"] + tokenizer.eos_token for message in messages if message["role"] == "assistant"]
        assert tokenizer.decode(learned) == "".join(said)
        assert row["completion"] == messages[-1]["content"]


@pytest.mark.parametrize("name", ["tiny", pytest.param("smollm2-135m", marks=pytest.mark.slow)])
def test_chat_tokens_are_those_of_the_template(name, tmp_path, request):
    if name != "tiny":
        request.getfixturevalue("smollm2")
    _check_tokens(_write_chats(tmp_path), _with_template(CHATML) if name == "tiny" else load_tokenizer(name))


def _adds(tokenizer, single):
    tokens = [("<|im_start|>", tokenizer.bos_token_id), ("<|im_end|>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=tokens)


def test_a_bos_from_template_and_tokenizer_comes_once(tmp_path):
    tokenizer = _with_template("{{ bos_token }}" + CHATML.replace("<|im_start|>", "#"))
    _adds(tokenizer, "<|im_start|> $A")
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    _check_tokens(_write_chats(tmp_path), tokenizer)


@pytest.mark.parametrize(
    ("template", "adds", "message"),
    [
        (None, None, "chat messages need a chat template, which this tokenizer does not have"),
        (CHATML.replace("<|im_end|>", "<end>"), None, "does not render the prompt, the answer and then"),
        (CHATML.replace("{% if add", "goodbye{% if add"), None, "does not render the prompt, the answer and then"),
        (CHATML + "{% if not add_generation_prompt %}bye{% endif %}", None, "writes 'bye' after <|im_end|>"),
        (CHATML.replace("m['content'] | trim", "m['content'][1:]"), None, "leaves out a part of the answer"),
        (CHATML.replace("'<|im_end|>", "'<|im_start|><|im_end|>"), None, "<|im_start|> is in the answer"),
        ("{{ messages[-1]['content'] + eos_token }}", None, "does not render the prompt, the answer and then"),
        ("{{ raise_exception('No system role.') }}", None, "refuses these messages: No system role."),
        (CHATML, "$A <|im_end|>", "adds special tokens that its chat template does not have"),
    ],
)
def test_templates_that_would_teach_something_else(tmp_path, template, adds, message):
    tokenizer = _with_template(template)
    if adds:
        _adds(tokenizer, adds)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_examples(_write_chats(tmp_path), tokenizer)
    assert re.search(r"chat\.jsonl, line 1(, message 2)?: ", str(error.value))


# what is refused


def _xlsx():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    return file.getvalue()


BAD = [  # name, content, the start of the message after the file's name, the remedy
    ("a.jsonl", b"", ": 0 rows", "two are the least"),
    ("a.jsonl", GOOD, ": 1 rows", "two are the least"),
    ("a.csv", b"prompt,completion\na,b\n", ": 1 rows", "two are the least"),
    ("a.jsonl", GOOD + b'\n{"prompt": "a", "completion":', ", line 3: not valid JSON", "each object on one line"),
    ("a.jsonl", b'{\n"prompt": "a"}', ", line 1: not valid JSON", "each object on one line"),
    ("a.json", b'\n[{"prompt": "a", "completion": "b"}]', ", line 1: a JSON array", "lines=True"),
    ("a.jsonl", GOOD + b'["a", "b"]', ", line 2: list found", "write an object"),
    ("a.jsonl", GOOD + b'{"prompt": "a", "answer": "b"}', ", line 2: 'completion' is missing", "rename the key"),
    ("a.jsonl", b'{"text": "a"}', ", line 1: 'prompt' is missing, found 'text'", 'prompt="question"'),
    ("a.jsonl", GOOD + b'{"prompt": 3, "completion": "b"}', ", line 2: 'prompt' is 3 (int)", "make it a string"),
    ("a.jsonl", b'{"prompt": "a", "completion": {"b": 1}}', ", line 1: 'completion' is {'b': 1} (dict)", "a string"),
    ("a.jsonl", b'{"prompt": "a", "completion": NaN}', ", line 1: 'completion' is nan (float)", "make it a string"),
    ("a.jsonl", GOOD + b'{"prompt": "a", "completion": " \\n"}', ", line 2: 'completion' is empty", "remove the row"),
    ("a.jsonl", b'{"prompt": "", "completion": "b"}', ", line 1: 'prompt' is empty", "fill it in"),
    ("a.jsonl", b'{"prompt": "a", "prompt": "c", "completion": "b"}', ", line 1: not usable JSON (a key", "mend"),
    ("a.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}", ", line 1: not usable JSON", "mend or remove"),
    ("a.jsonl", b"{" * 9 + b'"a":' + b"[" * 99_999, ", line 1: not ", "line"),
    ("a.jsonl", b'{"a": ' + b"[" * 99_999, ", line 1: not usable JSON", "mend or remove"),
    ("a.jsonl", b'{"prompt": "\\ud83d", "completion": "b"}', ", line 1: 'prompt' has half of a surrogate", "remove it"),
    ("a.jsonl", GOOD + b'{"prompt": "a\\u0000", "completion": "b"}', ", line 2: 'prompt' has the control character",
     "remove it"),
    ("a.jsonl", '{"prompt": "â€œaâ€\x9d", "completion": "b"}'.encode(), ", line 1: 'prompt' has the control character",
     "U+0080"),
    ("a.jsonl", GOOD.decode().encode("utf-16-le"), ", line 1: a zero byte", "UTF-16"),
    ("a.jsonl", GOOD + b'{"prompt": "caf\xe9", "completion": "b"}', ", line 2: not UTF-8", "save the file as UTF-8"),
    ("a.jsonl", b"\xef\xbb\xbf" + GOOD + b"\xe9", ", line 2: not UTF-8", "save the file as UTF-8"),
    ("a.csv", b"prompt,completion\na,b\n\xe9,b\n", ", line 3: not UTF-8", "save the file as UTF-8"),
    ("a.jsonl", GOOD.decode().encode("utf-16"), ": is UTF-16", "save it as UTF-8"),
    ("a.jsonl", GOOD + GOOD.decode().encode("utf-16-le"), ", line 2: a zero byte", "save the file as UTF-8"),
    ("a.jsonl", gzip.compress(GOOD), ": is compressed with gzip", "unpack it"),
    ("a.csv", _xlsx(), ": is an Excel workbook", "save the sheet as CSV UTF-8"),
    ("a.parquet", b"PAR1\x15\x04", ": is a Parquet file", "load_dataset"),
    ("a.txt", GOOD, ": the ending '.txt' is not known", "expected .jsonl"),
    ("a.csv", b"a,b\n1,2\n", ", line 2: 'prompt' is missing, found 'a', 'b'", "rename the key or column"),
    ("a.csv", b'prompt,completion\n\n"a\nc",b\n"d\ne",\n', ", line 5: 'completion' is empty", "remove the row"),
    ("a.csv", b'prompt,completion\na,b\n"c" d,e\n', ", line 3: broken CSV", "write a quote inside it twice"),
    ("a.csv", b'prompt,completion\na,b\n"c,e\nf,g\n', ", line 3: broken CSV", "write a quote inside it twice"),
    ("a.csv", b"prompt,completion\na,b,c\n", ", line 2: 3 fields, and the header has 2", "in quotes"),
    ("a.csv", b"prompt,completion\na\n", ", line 2: 1 fields, and the header has 2", "in quotes"),
    ("a.csv", b"prompt;completion\na;b\n", ", line 1: columns are separated by ';'", "save the file with commas"),
    ("a.csv", b"prompt\tcompletion\na\tb\n", ", line 1: columns are separated by '\\t'", "with commas"),
    ("a.csv", b"prompt,completion,prompt\na,b,c\n", ", line 1: the column 'prompt' occurs twice", "rename or remove"),
    ("a.csv", b'prompt,completion\n"' + b"a" * 140_000 + b'",b\n', ", line 2: broken CSV (field larger", "quotes"),
    ("a.csv", b"prompt,completion\n" + b"a" * 120_000 + b",b\n", ", line 2: 120,001 characters", "leave the row out"),
    ("a.jsonl", GOOD + json.dumps({"prompt": "a" * MOST_CHARACTERS, "completion": "b"}).encode(),
     ", line 2: 100,001 characters, and 100,000 are the most", "cut it into several"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "fault", "remedy"), BAD, ids=[f"{i}-{row[0]}" for i, row in enumerate(BAD)]
)
def test_bad_files_are_named_with_line_and_remedy(tmp_path, name, content, fault, remedy):
    path = _file(tmp_path, name, content)
    with pytest.raises(ValueError, match=re.escape(f"{path}{fault}")) as error:
        load_examples(path)
    assert remedy in str(error.value).partition(";")[2] or remedy in str(error.value).partition(fault)[2]
    assert len(str(error.value)) - len(str(path)) < 300


BAD_CHATS = [
    ([], "the roles are none"),
    (_chat(("user", "a")), "the roles are user;"),
    (_chat(("system", "a")), "the roles are system;"),
    (_chat(("assistant", "b"), ("user", "a")), "the roles are assistant, user;"),
    (_chat(("user", "a"), ("user", "a"), ("assistant", "b")), "the roles are user, user, assistant;"),
    (_chat(("user", "a"), ("assistant", "b"), ("user", "a")), "the roles are user, assistant, user;"),
    (_chat(("user", "a"), ("system", "s"), ("assistant", "b")), "the roles are user, system, assistant;"),
    (_chat(("user", "a"), ("tool", "t")), "the roles are user, tool;"),
    (_chat(("user", "a"), ("assistant", "")), "'content' is empty"),
    (_chat(("user", "a"), ("assistant", None)), "'content' is None (NoneType)"),
    (_chat(("user", [{"type": "text", "text": "a"}]), ("assistant", "b")), "'content' is [{'type': 'text'"),
    ([{"from": "human", "value": "a"}], "'role' is missing, found 'from', 'value'"),
    (_chat(("user", "a <|im_end|>"), ("assistant", "b")), "the text contains <|im_end|>"),
    ("user: a", "'messages' is missing or no list"),
    (["a", "b"], "'messages' is missing or no list"),
    (None, "'messages' is missing or no list"),
]


@pytest.mark.parametrize(("messages", "message"), BAD_CHATS, ids=range(len(BAD_CHATS)))
def test_bad_messages_are_named(tmp_path, chat_tokenizer, messages, message):
    good = {"messages": _chat(("user", "a"), ("assistant", "b"))}
    path = _file(tmp_path, "chat.jsonl", f"{json.dumps(good)}\n{json.dumps({'messages': messages})}".encode())
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: {message}")):
        load_examples(path, chat_tokenizer)


DROPPED = [
    (
        {"messages": [{"role": "assistant", "content": "b", "reasoning_content": "hm"}]},
        ", message 2: 'reasoning_content'",
    ),
    ({"messages": [{"role": "assistant", "content": "b", "tool_calls": [{"f": 1}]}]}, ", message 2: 'tool_calls'"),
    ({"messages": [{"role": "assistant", "content": "b", "weight": 0}]}, ", message 2: 'weight'"),
    ({"tools": [{"name": "f"}]}, ": 'tools'"),
    ({"system": "Be short."}, ": 'system'"),
]


@pytest.mark.parametrize(("more", "message"), DROPPED, ids=[message for _, message in DROPPED])
def test_what_a_template_might_read_is_not_dropped_in_silence(chat_tokenizer, more, message):
    user, answer = _chat(("user", "a"), ("assistant", "b"))
    harmless = {"messages": [user | {"name": "Bo"}, answer | {"weight": 1, "tool_calls": None}], "tools": None, "id": 7}
    assert list(load_examples(Dataset.from_list([harmless] * 2), chat_tokenizer)["completion"]) == ["b", "b"]
    row = {"messages": [user, *more.get("messages", [answer])]} | {k: v for k, v in more.items() if k != "messages"}
    with pytest.raises(ValueError, match=re.escape(f"row 1{message} would be dropped")):
        load_examples(Dataset.from_list([row] * 2), chat_tokenizer)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_answer_of_a_conversation_is_learned_as_with_trl_s_assistant_only_loss(tmp_path):
    import trl  # not among the packages of the fast tests

    marked = CHATML.replace(
        "m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}",
        "m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim + '<|im_end|>' }}"
        "{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] | trim + '<|im_end|>\n' }}{% endif %}",
    )
    tokenizer = _with_template(marked)
    settings = trl.SFTConfig(str(tmp_path), assistant_only_loss=True, use_cpu=True, report_to="none", max_length=None)
    rows = Dataset.from_list([{"messages": messages} for messages in CONVERSATIONS])
    trainer = trl.SFTTrainer(load_base("tiny"), settings, train_dataset=rows, processing_class=tokenizer)
    for theirs, ours in zip(trainer.train_dataset, encode(load_examples(rows, tokenizer), tokenizer), strict=True):
        batch, length = trainer.data_collator([theirs]), len(ours["input_ids"])
        assert batch["input_ids"][0, :length].tolist() == ours["input_ids"]
        assert batch["labels"][0, :length].tolist() == ours["labels"]
        assert (batch["labels"][0, length:] == -100).all()  # the template's line break
    assert [label for label in ours["labels"] if label != -100].count(tokenizer.eos_token_id) == 2


def test_two_formats_in_one_file(tmp_path, chat_tokenizer):
    chat = json.dumps({"messages": _chat(("user", "a"), ("assistant", "b"))}).encode()
    ends_twice = GOOD + b'{"prompt": "a", "completion": "b<|im_end|>\\n"}'
    for content, tokenizer, message in (
        (chat + b"\n" + GOOD, chat_tokenizer, "line 2: 'messages' is missing"),
        (GOOD + chat, chat_tokenizer, "line 2: 'prompt' is missing, found 'messages'"),
        (chat, None, "line 1: chat messages need a tokenizer"),
        (ends_twice, chat_tokenizer, "line 2: it ends with <|im_end|>, which encode adds; remove it"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            load_examples(_file(tmp_path, "a.jsonl", content), tokenizer)
    assert len(load_examples(_file(tmp_path, "a.jsonl", ends_twice))) == 2  # without a tokenizer nobody knows


def test_folders_and_missing_files(tmp_path):
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"rows\.jsonl: is a folder; give a file in it"):
        load_examples(tmp_path / "rows.jsonl")
    with pytest.raises(FileNotFoundError, match=r"none\.csv: there is no such file; look at its name"):
        load_examples(tmp_path / "none.csv")


pieces = st.sampled_from(
    [b'{"prompt": "a", "completion": "b"}', b"\n", b"\r\n", b'"', b",", b"{", b"}", b"[", b":", b"\xff", b"\0", b"1e9",
     b'"prompt"', b'"completion"', b'"messages"', b"prompt,completion", b"\xef\xbb\xbf", b"null", b"\\ud800", b"\xe2"]
)  # fmt: skip


@pytest.mark.slow
@settings(deadline=None, max_examples=300, derandomize=True)
@given(
    content=st.one_of(st.binary(max_size=60), st.lists(pieces, max_size=12).map(b"".join)),
    ending=st.sampled_from(["jsonl", "csv"]),
)
def test_any_bytes_load_or_are_refused_with_file_and_line(tmp_path_factory, content, ending):
    path = tmp_path_factory.getbasetemp() / f"any.{ending}"
    path.write_bytes(content)
    rows, said = [], ""
    try:
        rows = load_examples(path)
    except ValueError as error:
        said = str(error)
    if said:
        assert re.match(rf"{re.escape(str(path))}(, line \d+: |: is |: \d rows; )", said)
    else:
        assert len(rows) >= 2
        assert all(row[key].strip() for row in rows for key in ("prompt", "completion"))


# splitting


def test_normalized():
    for text in ("Where is my ＫＥＴＴＬＥ?", " where  is\nmy kettle", "Where is my kettle!! :)"):
        assert normalized(text) == "where is my kettle"
    assert normalized("Straße 12") == normalized("STRASSE 12") != normalized("Straße 13")
    assert normalized("e\u0301") == normalized("é")
    assert normalized("?!") == "?!" != normalized("!?")
    for one, other in (
        ("दिन", "दान"),
        ("กิน", "กัน"),
        ("ကို", "ကူ"),
        ("كَتَبَ", "كُتُب"),
        ("ok 👍🏽", "ok 👍🏿"),
        ("2+2", "2-2"),
    ):
        assert normalized(one) != normalized(other)
    assert normalized("☀️ on") == normalized("☀ on")


SCRIPTS = [range(start, start + 0x80) for start in (0x41, 0x600, 0x900, 0x980, 0xE00, 0x1000, 0xAC00, 0x1F300)]


@settings(deadline=None, max_examples=200, derandomize=True)
@given(
    st.sampled_from(SCRIPTS).flatmap(lambda part: st.text(st.sampled_from([chr(code) for code in part]), max_size=6))
)
def test_no_letter_vowel_sign_or_emoji_of_any_script_is_dropped(text):
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = [sign for sign in folded if unicodedata.category(sign)[0] in "LMNS"]
    if words:
        assert normalized(text).replace(" ", "").replace("_", "") == "".join(words)


texts = st.text(alphabet="aAb .!", min_size=1, max_size=4)


@pytest.mark.slow
@settings(deadline=None, max_examples=60, derandomize=True)
@given(prompts=st.lists(texts, min_size=3, max_size=40), seed=st.integers(0, 3))
def test_no_normalized_prompt_is_in_two_splits_and_no_row_is_lost(prompts, seed):
    rows = Dataset.from_list([{"prompt": prompt, "completion": str(i)} for i, prompt in enumerate(prompts)])
    shares = {"train": 0.5, "validation": 0.2, "test": 0.3}
    splits, said = {}, ""
    try:
        splits = split_examples(rows, shares, seed)
    except ValueError as error:
        said = str(error)
    if said:
        assert "leave the split" in said
        assert len({normalized(prompt) for prompt in prompts}) < len(prompts) or 0.2 * len(prompts) < 1
        return
    keys = {name: {normalized(prompt) for prompt in split["prompt"]} for name, split in splits.items()}
    assert sum(map(len, keys.values())) == len(set.union(*keys.values()))
    assert sorted(int(i) for split in splits.values() for i in split["completion"]) == list(range(len(prompts)))
    for name in ("validation", "test"):
        assert 1 <= len(splits[name]) <= shares[name] * len(prompts) + 1e-6
        assert list(map(int, splits[name]["completion"])) == sorted(map(int, splits[name]["completion"]))


def test_the_split_follows_from_the_seed_and_the_texts_alone():
    rows = load_examples(own_sample.TICKETS)
    splits = split_examples(rows)
    assert {name: len(split) for name, split in splits.items()} == {"train": 153, "validation": 25, "test": 38}
    assert {name: split.to_list() for name, split in split_examples(rows).items()} == {
        name: split.to_list() for name, split in splits.items()
    }
    keys = [{normalized(prompt) for prompt in split["prompt"]} for split in splits.values()]
    assert sum(map(len, keys)) == len(set.union(*keys)) == own_sample.MAILS
    turned = split_examples(rows.select(range(len(rows) - 1, -1, -1)))
    assert set(turned["test"]["prompt"]) == set(splits["test"]["prompt"])
    assert set(split_examples(rows, seed=1)["test"]["prompt"]) != set(splits["test"]["prompt"])


def test_splits_that_cannot_be():
    rows = Dataset.from_list([{"prompt": "a" * (i % 2 + 1), "completion": "b"} for i in range(20)])
    with pytest.raises(ValueError, match=r"20 rows with 2 different prompts leave the split 'validation' empty; add"):
        split_examples(rows)
    for shares in ({"train": 0.7, "test": 0.2}, {"train": 1.1, "test": -0.1}, {"train": 1.0, "test": 0.0}):
        with pytest.raises(ValueError, match="give positive shares with the sum 1"):
            split_examples(rows, shares)


# the sample


def test_the_sample_is_what_its_generator_makes(tmp_path):
    own_sample.write_sample(tmp_path / "new" / "tickets.jsonl")
    assert (tmp_path / "new" / "tickets.jsonl").read_bytes() == own_sample.TICKETS.read_bytes()
    assert len(own_sample.TICKETS.read_bytes()) < 50_000


def test_the_sample_has_its_blemishes_and_no_others():
    rows = load_examples(own_sample.TICKETS).to_list()
    assert len(rows) == own_sample.MAILS + 16
    exact = Counter((row["prompt"], row["completion"]) for row in rows)
    assert sum(count - 1 for count in exact.values()) == 6
    labels = {}
    for row in rows:
        labels.setdefault(normalized(row["prompt"]), set()).add(row["completion"])
    assert len(rows) - len(labels) == 16  # 6 repeated, 8 retyped, 2 labelled twice
    assert sum(len(found) > 1 for found in labels.values()) == 2
    assert sum(row["prompt"] != row["prompt"].strip() for row in rows) == 1
    assert sorted(len(row["prompt"]) > 400 for row in rows)[-3:] == [False, True, True]


def test_a_ticket_says_what_its_mail_says():
    wordings = [words for group in own_sample.COMPLAINTS.values() for words in group]
    assert len(set(wordings)) == len(wordings) == 30  # two topics share none
    priorities = Counter()
    for row in own_sample.sample_rows():
        topic, product, number, priority = row["completion"].removeprefix(" ").split(" | ")
        mail = re.sub(r"\s+", " ", row["prompt"].split("\n")[0]).lower()
        assert topic in own_sample.COMPLAINTS
        assert product in own_sample.PRODUCTS
        assert product in mail
        assert number in mail or (number == "none" and not re.search(r"\d", mail))
        urgent = any(words.lower().rstrip(".!") in mail for words in own_sample.URGENT)
        priorities[urgent == (priority == "urgent")] += 1
    assert priorities == {True: 214, False: 2}  # the two that were labelled twice


# folders that are whole


def test_a_folder_appears_when_its_block_has_ended_and_not_when_it_raises(tmp_path):
    target = tmp_path / "a" / "adapter"
    for stop in (KeyboardInterrupt, None):
        with contextlib.suppress(KeyboardInterrupt), atomic_folder(target) as folder:
            (folder / "file").write_text("x", encoding="utf-8")
            assert not target.exists()
            assert folder.parent == target.parent
            if stop:
                raise stop
        assert [path.name for path in tmp_path.rglob("*")] == (["a"] if stop else ["a", "adapter", "file"])


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "old").touch()
    message = r"adapter exists already; remove it, or choose another name"
    with pytest.raises(FileExistsError, match=message), atomic_folder(tmp_path / "adapter"):
        pytest.fail("the block must not start")
    assert [path.name for path in tmp_path.rglob("*")] == ["adapter", "old"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process to kill it")
def test_a_killed_process_leaves_nothing_that_looks_finished(tmp_path):
    target = tmp_path / "adapter"
    child = os.fork()
    if child == 0:  # writes the weights, and is killed while it evaluates
        try:
            with atomic_folder(target) as folder:
                (folder / "adapter_model.safetensors").write_bytes(b"half")
                (tmp_path / "written").touch()
                time.sleep(60)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 30
    while not (tmp_path / "written").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not target.exists()
    assert (tmp_path / "adapter.unfinished" / "adapter_model.safetensors").exists()
    with atomic_folder(target) as folder:  # the next run starts from nothing
        assert list(folder.iterdir()) == []
        (folder / "adapter_model.safetensors").write_bytes(b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "written"]
    assert (target / "adapter_model.safetensors").read_bytes() == b"whole"
