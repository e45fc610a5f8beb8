"""The course's calls fit the installed libraries, and tests/drift.py finds those that would not."""

import inspect
import json
import re
from collections import defaultdict
from importlib import metadata

import peft
import pytest
from drift import ROOT, drift, signature
from transformers import Trainer


@pytest.fixture(scope="module")
def course():
    return drift()


@pytest.fixture
def found(tmp_path):
    """What is found in one source, as a module of helpers and as the cell [7] of a notebook."""

    def find(source):
        cell = {"cell_type": "code", "execution_count": 7, "metadata": {}, "source": source.splitlines(keepends=True)}
        for path, text in (("helpers/seeded.py", source), ("notebooks/seeded.ipynb", json.dumps({"cells": [cell]}))):
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_text(text, encoding="utf-8")
        misses = list(drift(tmp_path).misses)
        in_file = [(m.library, m.version, m.place.split(", ")[1], m.what) for m in misses if "helpers/" in m.place]
        in_cell = [(m.library, m.version, m.place.split(", ")[1], m.what) for m in misses if ".ipynb [7]" in m.place]
        assert in_file == in_cell
        assert len(misses) == len(in_file + in_cell)
        assert all(version == metadata.version(library) for library, version, *_ in in_file)
        return {f"{library}: {place}: {what}" for library, _, place, what in in_file}

    return find


def test_the_course_calls_what_the_installed_libraries_have(course):
    assert not course.misses, "\n".join(map(str, course.misses))


def test_what_is_left_out_is_little_and_named(course):
    assert len(course.checked) > 1500
    assert course.left_out["calls without a signature"] < 0.25 * len(course.checked)
    assert course.left_out["calls in a try"] < 30
    absent = {name for name in course.left_out if name.startswith("not installed")}
    assert absent <= {"not installed: trl", "not installed: optuna"}  # of the extras


HEADER = """\
import functools
import torch
import transformers as tf
from helpers.seeded_base import load, settings_of
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments
"""
UNEXPECTED = "{}: got an unexpected keyword argument '{}'".format
SEEDED = {  # one line of source, and what is wrong with it
    # What published examples still pass, and transformers 5 has no longer.
    "TrainingArguments('x', warmup_fraction=0.1)": UNEXPECTED("TrainingArguments", "warmup_fraction"),
    "TrainingArguments('x', evaluation_strategy='no')": UNEXPECTED("TrainingArguments", "evaluation_strategy"),
    "TrainingArguments('x', no_cuda=True)": UNEXPECTED("TrainingArguments", "no_cuda"),
    "TrainingArguments('x', overwrite_output_dir=True)": UNEXPECTED("TrainingArguments", "overwrite_output_dir"),
    "TrainingArguments('x', save_safetensors=True)": UNEXPECTED("TrainingArguments", "save_safetensors"),
    "TrainingArguments('x', group_by_length=True)": UNEXPECTED("TrainingArguments", "group_by_length"),
    "Trainer(model=None, tokenizer=None)": UNEXPECTED("Trainer", "tokenizer"),
    "Trainer(model=None).train(resume=True)": UNEXPECTED("Trainer.train", "resume"),
    # Names.
    "from transformers import AdamW": "transformers has no AdamW",
    "from transformers.gone import AdamW": "import transformers.gone: ModuleNotFoundError",
    "tf.AdamW": "transformers has no AdamW",
    "make = tf.Trainer; make.trian": "Trainer has no trian",
    "LoraConfig().merge_weights()": "LoraConfig has no merge_weights",
    "load().add_adaptor(LoraConfig())": "PreTrainedModel has no add_adaptor",
    "get_peft_model(load(), LoraConfig()).merge_it()": "PeftModel has no merge_it",
    # Arguments, by the ways in which the course passes them.
    "tf.Trainer(modle=None)": UNEXPECTED("Trainer", "modle"),
    "torch.optim.AdamW([], learning_rate=1)": UNEXPECTED("AdamW", "learning_rate"),
    "torch.optim.AdamW()": "AdamW: missing a required argument: 'params'",
    "torch.manual_seed(0, 1)": "manual_seed: too many positional arguments",
    "PeftModel.from_pretrained(load(), 'x').merge_and_unload(gone=1)": UNEXPECTED("BaseTuner.merge_and_unload", "gone"),
    "functools.partial(TrainingArguments, gone=1)": UNEXPECTED("TrainingArguments", "gone"),
    "TrainingArguments('x', **{'seed': 1, 'gone': 2})": UNEXPECTED("TrainingArguments", "gone"),
    "s = {'seed': 1}; s['gone'] = 2; TrainingArguments('x', **s)": UNEXPECTED("TrainingArguments", "gone"),
    "s = {'seed': 1}; s |= {'gone': 2}; TrainingArguments('x', **(s | {}))": UNEXPECTED("TrainingArguments", "gone"),
    "settings_of(folder='x', seed=1, gone=2)": UNEXPECTED("TrainingArguments", "gone"),
    "settings_of('x', more={'args': 1, 'gone': 2})": UNEXPECTED("Trainer", "gone"),
    "f = lambda: TrainingArguments('x', gone=1)": UNEXPECTED("TrainingArguments", "gone"),
    "[TrainingArguments('x', gone=i) for i in (1, 2)]": UNEXPECTED("TrainingArguments", "gone"),
}
BASE = """\
from transformers import PreTrainedModel, Trainer, TrainingArguments

def load() -> PreTrainedModel: ...

def defaults() -> dict[str, object]:
    return {"learning_rate": 1e-3}

def settings_of(folder: str, more: dict | None = None, **settings: object) -> Trainer:
    arguments = TrainingArguments(**({"output_dir": folder} | defaults() | settings))
    return Trainer(args=arguments, **({"model": None} | (more or {})))
"""


@pytest.mark.parametrize(("line", "what"), SEEDED.items(), ids=SEEDED)
def test_a_fault_is_found_with_library_place_and_argument(found, tmp_path, line, what):
    (tmp_path / "helpers").mkdir()
    (tmp_path / "helpers" / "seeded_base.py").write_text(BASE, encoding="utf-8")
    (miss,) = found(HEADER + line)
    library = "torch" if "torch" in line else "peft" if "Lora" in what or "merge" in line else "transformers"
    assert miss.startswith(f"{library}: line 7: {what}"), miss


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    TrainingArguments('x', gone=1)\nexcept TypeError:\n    pass",
        "with pytest.raises(TypeError):\n    TrainingArguments('x', gone=1)",
        "model = load() if torch.rand(()) else object()\nmodel.gone()",
        "import not_installed\nnot_installed.gone()",
    ],
)
def test_no_miss_where_the_failure_is_meant_or_nothing_is_known(found, tmp_path, source):
    (tmp_path / "helpers").mkdir()
    (tmp_path / "helpers" / "seeded_base.py").write_text(BASE, encoding="utf-8")
    assert not found(HEADER + source)


def test_a_cell_that_is_to_raise_is_left_out_and_counted(tmp_path):
    cell = {
        "cell_type": "code",
        "execution_count": 1,
        "metadata": {"tags": ["raises-exception"]},
        "source": ["raise 1"],
    }
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "one.ipynb").write_text(json.dumps({"cells": [cell]}), encoding="utf-8")
    assert drift(tmp_path).left_out["cells that raise"] == 1


def _cells_with(pattern):
    """The helpers, and the notebooks' cells, whose code has this."""
    for path in (ROOT / "helpers").rglob("*.py"):
        if re.search(pattern, path.read_text(encoding="utf-8")):
            yield path.relative_to(ROOT).as_posix()
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code" and re.search(pattern, "".join(cell["source"])):
                yield f"notebooks/{path.name} [{cell['execution_count']}]"


def test_what_a_later_version_drops_or_asks_for_is_found_in_the_course(monkeypatch):
    keep = [p for name, p in inspect.signature(Trainer).parameters.items() if name != "processing_class"]
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.1.0" if name == "peft" else real(name))
    monkeypatch.setattr(Trainer, "__signature__", inspect.Signature(keep), raising=False)
    monkeypatch.delattr(peft, "prepare_model_for_kbit_training")
    signature.cache_clear()
    try:
        found = defaultdict(set)
        for miss in drift().misses:
            if miss.library != "trl":  # its SFTTrainer inherits the changed signature
                found[miss.library, miss.what.split(",")[0]].add(miss.place.split(", line")[0])
    finally:
        signature.cache_clear()
    dropped = found.pop(("transformers", "Trainer: got an unexpected keyword argument 'processing_class'"))
    assert {"helpers/training.py", "helpers/labs/clinic.py"} <= dropped <= set(_cells_with("processing_class="))
    imports = r"(?m)^from peft import .*prepare_model_for_kbit_training"
    assert found.pop(("peft", "peft has no prepare_model_for_kbit_training")) == set(_cells_with(imports))
    ((_, what), places), *others = found.items()
    assert re.match(r"PeftAdapterMixin.add_adapter needs peft>=[\d.]+", what)
    in_a_try = {"helpers/commands/doctor.py"}
    assert places == set(_cells_with(r"\.add_adapter\(")) - in_a_try
    assert not others
