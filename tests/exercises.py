"""What the tests of the exercise checks share: the notebook's own functions, and the line that a check prints."""

import ast
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
                namespace = {"torch": torch, "nn": nn, "F": F, "math": math, "np": np, "Callable": Callable}
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
