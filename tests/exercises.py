"""The functions of a notebook's exercise and solution cells, for the tests of its checks."""

import ast
import math
from pathlib import Path

import nbformat
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
                namespace = {"torch": torch, "nn": nn, "F": F, "math": math}
                exec(compile(tree, f"{notebook} {tag}", "exec"), namespace)
                functions |= {node.name: namespace[node.name] for node in tree.body}
        found.append(functions)
    stubs, solutions = found
    assert list(stubs) == list(solutions)
    assert len(stubs) >= 3
    return stubs, solutions
