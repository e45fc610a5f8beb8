"""The exercises' functions, as the committed notebooks have them."""

import ast
import hashlib
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import nbformat
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
# What the notebooks import for their exercises.
NOTEBOOK_NAMES = {"torch": torch, "nn": nn, "F": F, "math": math, "np": np, "hashlib": hashlib, "Callable": Callable}


@cache
def exercise_functions(notebook):
    """Return two dicts from name to function: the stubs, and the solutions, in the notebook's order."""
    stubs, solutions = {}, {}
    for cell in nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", as_version=4).cells:
        for tag, functions in (("exercise", stubs), ("solution", solutions)):
            if tag in cell.metadata.get("tags", []):
                tree = ast.parse(cell.source)
                tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
                namespace = dict(NOTEBOOK_NAMES)
                exec(compile(tree, f"{notebook} {tag}", "exec"), namespace)
                functions |= {node.name: namespace[node.name] for node in tree.body}
    assert list(stubs) == list(solutions)
    return stubs, solutions
