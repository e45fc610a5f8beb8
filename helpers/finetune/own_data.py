"""From a file that somebody else wrote to prompts and completions, split without leaks.

`load_examples` reads JSON Lines with prompts and completions or with chat messages, CSV, or rows that `datasets` has
loaded. What it cannot read it refuses, with the file, the line and a remedy.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

MOST_CHARACTERS = 100_000  # of a row; about 25,000 tokens of English. csv itself stops at 131,072 for a field
MESSAGE_KEYS = frozenset({"role", "content", "name", "id", "timestamp", "created_at"})
ROW_KEYS = ("tools", "functions", "documents", "system")  # beside the messages
DRAWN = "\ufe0e\ufe0f"  # variation selectors: as text, as a picture
SHARES = {"train": 0.7, "validation": 0.12, "test": 0.18}
NOT_TEXT = {  # how files begin that only look like text files by their name
    b"\x1f\x8b": "is compressed with gzip; unpack it first",
    b"PK\x03\x04": "is an Excel workbook or a zip archive; save the sheet as CSV UTF-8, or unpack the archive",
    b"PAR1": 'is a Parquet file; give the rows of datasets.load_dataset("parquet", data_files=…, split="train")',
    codecs.BOM_UTF16_LE: "is UTF-16; save it as UTF-8",
    codecs.BOM_UTF16_BE: "is UTF-16; save it as UTF-8",
}


def load_examples(
    source: str | Path | Dataset,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    prompt: str = "prompt",
    completion: str = "completion",
) -> Dataset:
    """Read prompts and completions, ready for `helpers.data.encode`.

    A row with chat `messages` becomes a prompt, all but the last message as the tokenizer's chat template renders them
    with `add_generation_prompt=True`, and a completion, the last message without the end of turn. `encode` adds that
    back as the EOS, so that prompt and completion give the tokens of the template's rendering of the whole
    conversation, up to the EOS. Where the assistant speaks more than once, a column `answers` says which parts of the
    prompt are earlier answers, end of turn included: they are learned as well.

    Args:
        source: a UTF-8 file, or a Dataset such as `datasets.load_dataset("owner/name", split="train")` returns. The
            file's ending says what it is: .jsonl, .ndjson or .json for one JSON object a line, .csv for columns with a
            header and commas. Blank lines are skipped, and other keys and columns dropped.
        tokenizer: needed for chat messages. With it, a completion that has its EOS already is refused.
        prompt, completion: the names of the keys or columns.

    Returns:
        A Dataset with the string columns `prompt` and `completion`, and `answers` if need be, as long as the source and
        in its order. The strings are not changed, white space at their ends included.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file or a row of it cannot be used; the message names the file, the line where there is one (a
            row's first, counted from 1; a Dataset's rows are counted from 1 as well), and what to do about it.
    """
    examples: list[dict[str, Any]] = []
    for where, row in _rows(source, {prompt, completion}):
        if not examples:
            chat = "messages" in row and prompt not in row
        if chat:
            question, answer, earlier = _from_chat(row, where, tokenizer)
        else:
            question, answer, earlier = _string(row, prompt, where), _string(row, completion, where), []
        if len(question) + len(answer) > MOST_CHARACTERS:
            raise ValueError(
                f"{where}: {len(question) + len(answer):,} characters, and {MOST_CHARACTERS:,} are the most; leave the "
                "row out or cut it into several. If it should be short, look for a missing quote in it"
            )
        if tokenizer and tokenizer.eos_token and answer.rstrip().endswith(tokenizer.eos_token):
            raise ValueError(f"{where}: it ends with {tokenizer.eos_token}, which encode adds; remove it from the file")
        if special := [token for token in tokenizer.all_special_tokens if token in answer] if tokenizer else []:
            raise ValueError(
                f"{where}: {special[0]} is in the answer, and ends or begins a turn; remove it, or split the row. If "
                "the chat template writes it, set tokenizer.eos_token to the token that ends a turn"
            )
        examples.append({"prompt": question, "completion": answer, "answers": earlier})
    if len(examples) < 2:
        name = "the dataset" if isinstance(source, Dataset) else source
        raise ValueError(f"{name}: {len(examples)} rows; two are the least, and some dozens are a start")
    dataset = Dataset.from_list(examples)
    return dataset if any(example["answers"] for example in examples) else dataset.remove_columns("answers")


def _rows(source: str | Path | Dataset, needed: set[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(source, Dataset):
        yield from ((f"the dataset, row {number}", row) for number, row in enumerate(source, start=1))
        return
    path = Path(source)
    text, ending = _text(path), path.suffix.lower()
    if ending == ".csv":
        yield from _csv_rows(path, text, needed)
    elif ending in (".jsonl", ".ndjson", ".json"):
        yield from _json_rows(path, text)
    else:
        raise ValueError(f"{path}: the ending {ending!r} is not known; expected .jsonl, .json, .ndjson or .csv")


def _text(path: Path) -> str:
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give a file in it")
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file; look at its name, and at the folder that you are in")
    raw = path.read_bytes()
    for start, remedy in NOT_TEXT.items():
        if raw.startswith(start):
            raise ValueError(f"{path}: {remedy}")
    raw = raw.removeprefix(codecs.BOM_UTF8)
    if b"\0" in raw:
        line = raw.count(b"\n", 0, raw.index(b"\0")) + 1
        raise ValueError(f"{path}, line {line}: a zero byte; save the file as UTF-8 text (UTF-16 has such bytes)")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if text.lstrip().startswith("["):
        raise ValueError(
            f"{path}, line 1: a JSON array, and not an object a line; convert it with "
            "pandas.read_json(old).to_json(new, orient='records', lines=True)"
        )
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: strings may have a U+2028 in them
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line, object_pairs_hook=_no_key_twice)
        except json.JSONDecodeError as error:
            fault = f"{error.msg} at column {error.colno}"
            raise ValueError(f"{where}: not valid JSON ({fault}); write each object on one line") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not usable JSON ({error}); mend or remove the line") from None
        if not isinstance(row, dict):
            raise ValueError(f'{where}: {type(row).__name__} found; write an object such as {{"prompt": …}}')
        yield where, row


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a key occurs twice in an object")
    return row


def _csv_rows(path: Path, text: str, needed: set[str]) -> Iterator[tuple[str, dict[str, str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            remedy = "put a field with commas, quotes or line breaks in quotes, and write a quote inside it twice"
            raise ValueError(f"{where}: broken CSV ({error}); {remedy}") from None
        if len(fields) <= 1 and not "".join(fields).strip():
            continue
        if not header:
            header = [field.strip() for field in fields]
            twice = sorted({name for name in header if header.count(name) > 1} & needed)
            if twice:
                raise ValueError(f"{where}: the column {twice[0]!r} occurs twice; rename or remove one of the two")
            separator = next((c for c in ";\t|" if len(header) == 1 and c in header[0]), None)
            if separator:
                raise ValueError(f"{where}: columns are separated by {separator!r}; save the file with commas")
        elif len(fields) != len(header):
            raise ValueError(
                f"{where}: {len(fields)} fields, and the header has {len(header)}; put a field with a comma in quotes"
            )
        else:
            yield where, dict(zip(header, fields, strict=True))


def _string(row: Mapping[str, Any], key: str, where: str) -> str:
    if key not in row:
        found = ", ".join(map(repr, row)) or "nothing"
        raise ValueError(
            f"{where}: {key!r} is missing, found {found[:200]}; rename the key or column, or give its name as in "
            f'load_examples(…, prompt="question", completion="answer")'
        )
    value = row[key]
    if not isinstance(value, str):
        hint = ", or read the CSV with keep_default_na=False if it says NA or None" if value is None else ""
        kind = type(value).__name__
        raise ValueError(f"{where}: {key!r} is {str(value)[:40]} ({kind}); make it a string, in quotes{hint}")
    if not value.strip():
        raise ValueError(f"{where}: {key!r} is empty; fill it in or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: {key!r} has half of a surrogate pair, such as a cut emoji; remove it") from None
    if control := next((sign for sign in value if unicodedata.category(sign) == "Cc" and sign not in "\t\n\r"), ""):
        raise ValueError(
            f"{where}: {key!r} has the control character U+{ord(control):04X}; remove it. Between U+0080 and U+009F it "
            "means that UTF-8 was read in another encoding"
        )
    return value


def _turns(row: Mapping[str, Any], where: str, special_tokens: list[str]) -> list[dict[str, str]]:
    """Return the messages of a row: user and assistant in turn, after a system message or none."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(f'{where}: \'messages\' is missing or no list of objects; write [{{"role": …, "content": …}}]')
    turns = [{key: _string(message, key, where) for key in ("role", "content")} for message in messages]
    for number, message in enumerate(messages, start=1):
        _refuse_dropped(message, MESSAGE_KEYS, f"{where}, message {number}")
    roles = [turn["role"] for turn in turns]
    dialogue = roles[1:] if roles[:1] == ["system"] else roles
    if not dialogue or dialogue != ["user", "assistant"] * (len(dialogue) // 2):
        raise ValueError(
            f"{where}: the roles are {', '.join(roles)[:200] or 'none'}; expected user and assistant in turn, after a "
            "system message or none, with an assistant's answer at the end"
        )
    for token in special_tokens:
        if any(token in turn["content"] for turn in turns):
            raise ValueError(f"{where}: the text contains {token}, which ends or begins a turn; remove it")
    return turns


def _refuse_dropped(row: Mapping[str, Any], harmless: frozenset[str], where: str) -> None:
    """Refuse what would be dropped in silence, though a chat template or a trainer may read it."""
    for key, value in row.items():
        empty = value is None or value == "" or value == [] or value == {}
        if key not in harmless and not empty and not (key == "weight" and value == 1):
            raise ValueError(f"{where}: {key!r} would be dropped, and with it what it says; remove the key, or the row")


def _from_chat(
    row: Mapping[str, Any], where: str, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[str, str, list[list[int]]]:
    if tokenizer is None or not tokenizer.chat_template:
        fault = "a tokenizer" if tokenizer is None else "a chat template, which this tokenizer does not have"
        raise ValueError(f"{where}: chat messages need {fault}; load that of an instruct model and pass it")
    _refuse_dropped({key: row[key] for key in ROW_KEYS if key in row}, frozenset(), where)
    turns = _turns(row, where, tokenizer.all_special_tokens)
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    eos = tokenizer.eos_token or "<no EOS>"
    try:
        befores = [
            tokenizer.apply_chat_template(turns[:i], tokenize=False, add_generation_prompt=True) for i in answers
        ]
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # templates raise what they like
        raise ValueError(f"{where}: the chat template refuses these messages: {error}") from error
    spans = []  # of each answer, its EOS included, in the whole
    for i, before in zip(answers, befores, strict=True):
        end = whole.find(eos, len(before)) + len(eos)
        if not whole.startswith(before) or end < len(before) + len(eos):
            raise ValueError(
                f"{where}: the chat template does not render the prompt, the answer and then the tokenizer's EOS, {eos}"
                "; set tokenizer.eos_token to the token that ends a turn, or write prompts yourself"
            )
        if turns[i]["content"].strip() not in whole[len(before) : end]:
            raise ValueError(
                f"{where}, message {i + 1}: the chat template leaves out a part of the answer, such as its reasoning; "
                "take that out yourself, or write prompts and completions"
            )
        spans.append([len(before), end])
    if whole[spans[-1][1] :].strip():
        raise ValueError(
            f"{where}: the chat template writes {whole[spans[-1][1] :].strip()[:40]!r} after {eos}; set "
            "tokenizer.eos_token to the token that ends a turn, or write prompts yourself"
        )
    before, answer = befores[-1], whole[spans[-1][0] : spans[-1][1] - len(eos)]
    ids = tokenizer(before, add_special_tokens=False).input_ids
    if tokenizer(before).input_ids != ids:  # the tokenizer adds the BOS that the template has written already
        bos = tokenizer.bos_token or ""
        before, spans = before.removeprefix(bos), [[start - len(bos), end - len(bos)] for start, end in spans]
        if tokenizer(before).input_ids != ids:
            raise ValueError(f"{where}: the tokenizer adds special tokens that its chat template does not have")
    return before, answer, spans[:-1]


def normalized(text: str) -> str:
    """Return the words of a text without case, punctuation and white space: a key for finding duplicates.

    Unicode's NFKC, then casefold, then every run of punctuation (but the underscore), separators and control characters
    becomes a space. Letters, digits, the marks that are part of a letter (the vowel signs of दिन and دِن), and symbols
    with emoji are kept; the signs that only choose how an emoji is drawn are not. A text without any is its own key.
    """
    signs = unicodedata.normalize("NFKC", text).casefold()
    kept = (
        sign if sign == "_" or unicodedata.category(sign)[0] in "LNMS" else " " for sign in signs if sign not in DRAWN
    )
    return " ".join("".join(kept).split()) or text


def shared_prompts(dataset: Dataset, train: Dataset) -> list[int]:
    """Return which rows of a dataset, counted from 1, have a prompt that is `normalized` in the training rows too."""
    known = set(map(normalized, train["prompt"]))
    return [number for number, prompt in enumerate(dataset["prompt"], start=1) if normalized(prompt) in known]


def split_examples(dataset: Dataset, shares: Mapping[str, float] = SHARES, seed: int = 0) -> DatasetDict:
    """Split rows so that prompts with the same `normalized` text are on one side.

    Groups of such rows come in an order given by the seed and their text alone. Each goes to the first split after
    `shares`' first one that still has room for it, or else to the first: no other gets more than its share of the
    rows. Within a split the rows keep their order.

    Args:
        dataset: column `prompt`.
        shares: of the rows, by the names of the splits; the first takes what the others leave.
        seed: for another split.

    Raises:
        ValueError: `shares` are not positive with a sum of 1, or a split stays empty.
    """
    if min(shares.values()) <= 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"shares={dict(shares)}: give positive shares with the sum 1")
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(dataset["prompt"]):
        groups.setdefault(normalized(prompt), []).append(i)
    first, *others = shares
    chosen: dict[str, list[int]] = {name: [] for name in shares}
    for key in sorted(groups, key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest()):
        rows = groups[key]
        fitting = (name for name in others if len(chosen[name]) + len(rows) <= shares[name] * len(dataset) + 1e-6)
        chosen[next(fitting, first)] += rows
    empty = [name for name, rows in chosen.items() if not rows]
    if empty:
        raise ValueError(
            f"{len(dataset)} rows with {len(groups)} different prompts leave the split {empty[0]!r} empty; add rows or "
            "give it a larger share"
        )
    return DatasetDict({name: dataset.select(sorted(rows)) for name, rows in chosen.items()})
