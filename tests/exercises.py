"""What the tests of the exercise checks share: the notebook's own functions, and the line that a check prints."""

import ast
import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
# What the notebooks import for their exercises.
NOTEBOOK_NAMES = {"torch": torch, "nn": nn, "F": F, "math": math, "np": np, "hashlib": hashlib, "Callable": Callable}


def exercise_functions(notebook):
    """Return two dicts from name to function: the stubs, and the solutions, as the committed notebook has them."""
    cells = nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", as_version=4).cells
    found = []
    for tag in ("exercise", "solution"):
        functions = {}
        for cell in cells:
            if tag in cell.metadata.get("tags", []):
                tree = ast.parse(cell.source)
                tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
                namespace = dict(NOTEBOOK_NAMES)
                exec(compile(tree, f"{notebook} {tag}", "exec"), namespace)
                functions |= {node.name: namespace[node.name] for node in tree.body}
        found.append(functions)
    stubs, solutions = found
    assert list(stubs) == list(solutions)
    assert len(stubs) >= 3
    return stubs, solutions


def said(checks, capsys, name, function):
    """Return what the check of this name prints about a function: one line. Nothing else may be changed by it."""
    function.__name__ = name
    state = torch.get_rng_state()
    getattr(checks, name)(function)
    assert torch.equal(torch.get_rng_state(), state), "the check leaves other random numbers behind"
    printed = capsys.readouterr().out
    assert printed.startswith(f"{name}: "), printed
    assert printed.count("\n") == 1, printed
    return printed


def each_wrong_answer(wrong):
    """Parametrize a test over rows of (name of the exercise, wrong answer, a part of the hint that it should get)."""
    ids = [f"{name}-{number}" for number, (name, _, _) in enumerate(wrong)]
    return pytest.mark.parametrize(("name", "function", "hint"), wrong, ids=ids)


def exercise_tests(checks, stubs, solutions, wrong):
    """Return the two tests that each set of checks has; the module that calls this gives them their names.

    The first: a solution is correct, and a stub is not written yet. The second, for the rows of `each_wrong_answer`: a
    wrong answer is not correct yet and gets its hint, or its own error where the hint says that.
    """

    @pytest.mark.parametrize("name", solutions)
    def test_solution_and_stub(name, capsys):
        printed = said(checks, capsys, name, solutions[name])
        assert printed.startswith(f"{name}: correct. "), printed
        printed = said(checks, capsys, name, stubs[name])
        assert printed.startswith(f"{name}: not written yet. "), printed

    @each_wrong_answer(wrong)
    def test_mistake(name, function, hint, capsys):
        printed = said(checks, capsys, name, function)
        verdict = "your function raised " if hint.startswith("your function raised ") else "not yet. "
        assert printed.startswith(f"{name}: {verdict}"), printed
        assert hint in printed, printed

    return test_solution_and_stub, test_mistake
