"""What tests/ and notebooks/ share: seeds, no network, a clean working folder for each notebook, and the model.

It is at the top because pytest applies a conftest only to the folders below it.
"""

import os
import random
import tempfile
from pathlib import Path

from helpers.fetch import fetch_smollm2

import nbval.plugin
import numpy as np
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # the notebooks' kernels inherit it
os.environ["TOKENIZERS_PARALLELISM"] = "false"

_smollm2: list[Path | str] = []  # the folder, or why there is none; asked for once


def smollm2_or_skip() -> Path:
    """Return the folder of smollm2-135m. Without it a test is skipped; in CI (variable CI) it fails."""
    if not _smollm2:
        try:
            _smollm2.append(fetch_smollm2())
        except (RuntimeError, OSError) as error:
            _smollm2.append(f"needs smollm2-135m; get it with `python -m helpers fetch`: {error}")
    found = _smollm2[0]
    if isinstance(found, Path):
        return found
    if os.environ.get("CI"):
        pytest.fail(found)
    pytest.skip(found)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return smollm2_or_skip()


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collectstart(collector: pytest.Collector) -> None:
    if isinstance(collector, nbval.plugin.IPyNbFile):
        # Text on stderr (progress bars, a library's remarks on the hardware) differs between machines.
        collector.skip_compare += ("stderr",)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    if isinstance(item, nbval.plugin.IPyNbCell) and "smollm2-135m" in item.parent.path.read_text(encoding="utf-8"):
        smollm2_or_skip()


def pytest_configure(config: pytest.Config) -> None:
    """Have nbval start each kernel in an empty folder, not in notebooks/, so that a run leaves nothing behind."""
    start_in_notebooks = nbval.plugin.RunningKernel

    def start_in_empty_folder(kernel_name: str, cwd: str, **options: object) -> nbval.plugin.RunningKernel:
        folder = tempfile.TemporaryDirectory(prefix="notebook-", ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        return start_in_notebooks(kernel_name, cwd=folder.name, **options)

    nbval.plugin.RunningKernel = start_in_empty_folder
    config.add_cleanup(lambda: setattr(nbval.plugin, "RunningKernel", start_in_notebooks))
