"""What tests/ and notebooks/ share: seeds, no network, a clean folder for each notebook, model, browser, record.

It is at the top because pytest applies a conftest only to the folders below it.
"""

import json
import os
import platform
import random
import re
import shlex
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from helpers.fetch import cache_dir, fetch_smollm2
from helpers.finetune.folders import atomic_write_text
from helpers.hardware import profile

import nbval.plugin
import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent
os.environ["HF_HUB_OFFLINE"] = "1"  # the notebooks' kernels inherit it
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# In CI a skipped test is a failed one, unless its reason is one of these, with what runs it there. So no test can be
# skipped everywhere without anyone seeing it.
ALLOWED_SKIPS = {
    "needs a CUDA GPU": "gpu.yml",
    "needs a GPU with bf16": "gpu.yml, on a GPU that has it",
    "needs a CPU with AVX512-BF16": "any machine with such a CPU; some of GitHub's have one",
    "bitsandbytes packs 4-bit weights on CPUs with AVX512-BF16 only": "any machine with such a CPU",
    "this version of bitsandbytes does not repack weights": "tests.yml, with the newest version",
    "about the fallback on a CPU": "tests.yml, on a CPU",
    "this version of Transformers still takes warmup_ratio": "tests.yml, with the lock",
}
ALLOWED_ELSEWHERE = {  # on macOS and Windows; Linux runs these in tests.yml
    "needs file permissions as POSIX has them",
    "needs setrlimit",
    "forks a process to kill it",
    "SIGKILL and fork need a Unix",
    "reads Linux's /proc",
}
# What a notebook prints about the end of a training; the record keeps these lines.
RESULT_LINE = re.compile(
    r"step +(\d+) of \1: .*loss|\d+ (updates|steps)[,;] loss|validation loss: |exact match.*\d|.* \d+ of \d+ right",
    re.I,
)

_smollm2: list[Path | str] = []  # the folder, or why there is none; asked for once


def smollm2_or_skip() -> Path:
    """Return the folder of smollm2-135m. Without it a test is skipped, which fails in CI."""
    if not _smollm2:
        try:
            _smollm2.append(fetch_smollm2())
        except (RuntimeError, OSError) as error:
            _smollm2.append(f"needs smollm2-135m; get it with `python -m helpers fetch`: {error}")
    found = _smollm2[0]
    if isinstance(found, Path):
        return found
    pytest.skip(found)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return smollm2_or_skip()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Playwright's own Chromium where it is installed, otherwise the system's."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.skip("needs Playwright: pip install -e '.[browser]'")
    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
        if not Path(path).exists():
            path = shutil.which("chromium") or shutil.which("chromium-browser")
        if path is None:
            pytest.skip("needs Chromium: python -m playwright install --with-deps chromium")
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collectstart(collector: pytest.Collector) -> None:
    if isinstance(collector, nbval.plugin.IPyNbFile):
        # Text on stderr (progress bars, a library's remarks on the hardware) differs between machines.
        collector.skip_compare += ("stderr",)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the slow tests out, but for `--slow` or a `-m` of one's own. What trains the real model is slow."""
    for item in items:
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")
    asked_for = config.option.slow or any(str(word).startswith("-m") for word in config.invocation_params.args)
    if not asked_for:
        slow = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if item not in set(slow)]
        config.hook.pytest_deselected(items=slow)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        asked_for = item.config.option.markexpr == "cuda"  # then a machine whose GPU is not seen must not pass
        (pytest.fail if asked_for else pytest.skip)("needs a CUDA GPU")
    if isinstance(item, nbval.plugin.IPyNbCell) and "smollm2-135m" in item.parent.path.read_text(encoding="utf-8"):
        smollm2_or_skip()


def _reason(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return f"expected to fail: {report.wasxfail}"
    return report.longrepr[2].removeprefix("Skipped: ")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.skipped and os.environ.get("CI"):
        reason = _reason(report)
        if reason not in ALLOWED_SKIPS and (platform.system() == "Linux" or reason not in ALLOWED_ELSEWHERE):
            report.outcome = "failed"
            report.longrepr = f"skipped in CI, for a reason that conftest.py does not allow: {reason}"
    return report


def pytest_addoption(parser: pytest.Parser) -> None:
    help_ = "write what the run found (device, versions, date, seconds, outcomes, losses) to FILE, as JSON"
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")
    parser.addoption("--results", metavar="FILE", type=Path, help=help_)


def pytest_configure(config: pytest.Config) -> None:
    """Have nbval start each kernel in an empty folder, not in notebooks/, so that a run leaves nothing behind."""
    if config.option.results and not config.option.collectonly:
        config.pluginmanager.register(Record(config))
    start_in_notebooks = nbval.plugin.RunningKernel

    def start_in_empty_folder(kernel_name: str, cwd: str, **options: object) -> nbval.plugin.RunningKernel:
        folder = tempfile.TemporaryDirectory(prefix="notebook-", ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        return start_in_notebooks(kernel_name, cwd=folder.name, **options)

    nbval.plugin.RunningKernel = start_in_empty_folder
    config.add_cleanup(lambda: setattr(nbval.plugin, "RunningKernel", start_in_notebooks))


def _versions() -> dict[str, str]:
    names = sorted(Requirement(line).name for line in metadata.requires("lora-lab") or [] if "extra ==" not in line)
    return {name: metadata.version(name) for name in names}


def off_lock(lock: str) -> dict[str, str]:
    """Return what is installed in another version than a lock's text says for this machine: {package: "1.1, not 1.0"}.

    A build of the version counts as the version: torch 2.13.0+cpu is 2.13.0. What the lock has and this environment has
    not (an extra's, or CUDA's libraries beside a CPU build) is no difference.
    """
    found = {}
    for line in map(Requirement, (line for line in lock.splitlines() if line and not line.startswith("#"))):
        if line.marker is None or line.marker.evaluate():
            with suppress(metadata.PackageNotFoundError):
                here = metadata.version(line.name)
                if not line.specifier.contains(here, prereleases=True):
                    found[line.name] = f"{here}, not {str(line.specifier).removeprefix('==')}"
    return found


def _bytes_of_packages(name: str, extras: frozenset[str], seen: set) -> int:
    """The disk that an installed package takes with its extras, and with all that it needs and `seen` has not."""
    if (name, extras) in seen:
        return 0
    total = 0
    try:
        package = metadata.distribution(name)
    except metadata.PackageNotFoundError:  # an extra that is not installed, as on Colab
        return 0
    if name not in {other for other, _ in seen}:
        files = [Path(file.locate()) for file in package.files or []]
        total = sum(-(-file.stat().st_size // 4096) * 4096 for file in files if file.is_file())  # in blocks of 4 KiB
    seen.add((name, extras))
    for requirement in map(Requirement, package.requires or []):
        wanted = [not requirement.marker or requirement.marker.evaluate({"extra": extra}) for extra in extras | {""}]
        if any(wanted):
            total += _bytes_of_packages(canonicalize_name(requirement.name), frozenset(requirement.extras), seen)
    return total


def chosen(config: pytest.Config) -> list[str]:
    """Return the arguments of this run that may change what is run or compared: all but a few that do not."""
    harmless = re.compile(r"--results=.*|--durations=\d+|-[qv]+|--results|" + re.escape(str(config.option.results)))
    given = [*os.environ.get("PYTEST_ADDOPTS", "").split(), *config.invocation_params.args]
    return [argument for argument in given if not harmless.fullmatch(argument)]


# The arguments with which every test runs, and every notebook, compared with the stored outputs.
EVERYTHING = ["--slow"]


class Record:
    """What `--results FILE` writes when the run has come to its end. A run that is cut short writes nothing."""

    def __init__(self, config: pytest.Config) -> None:
        self.config, self.file = config, config.option.results
        if not self.file.absolute().parent.is_dir():
            raise pytest.UsageError(f"--results {self.file}: make the folder {self.file.parent} first")
        self.start = time.monotonic()
        self.outcomes: dict[pytest.Item, str] = {}
        self.skips: Counter[str] = Counter()
        self.notebooks: dict[str, dict] = {}
        self.message = f"no results in {self.file}: the run was cut short"

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo):
        report = yield
        if report.skipped:
            self.skips[_reason(report)] += 1
        if report.when == "setup" or (not report.passed and self.outcomes[item] != "failed"):
            self.outcomes[item] = report.outcome
        if isinstance(item, nbval.plugin.IPyNbCell):
            empty = {"seconds": 0.0, "passed": 0, "failed": 0, "uncompared": 0, "lines": []}
            notebook = self.notebooks.setdefault(item.path.stem, empty)
            notebook["seconds"] += report.duration  # with the kernel's start in the first cell, its end in the last
            if report.when == "call":
                texts = [out.get("text", "") for out in item.test_outputs or [] if out.get("name") == "stdout"]
                lines = [line.strip() for line in "".join(texts).splitlines()]
                notebook["lines"] += [line for line in lines if RESULT_LINE.match(line)]
            if report.when == "teardown":
                notebook["uncompared"] += not item.options["check"]
                if self.outcomes[item] in notebook:
                    notebook[self.outcomes[item]] += 1
        return report

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus not in (0, 1) or len(self.outcomes) != session.testscollected:
            return
        tests = Counter(got for item, got in self.outcomes.items() if not isinstance(item, nbval.plugin.IPyNbCell))
        for notebook in self.notebooks.values():
            notebook["seconds"] = round(notebook["seconds"], 1)
        given = chosen(self.config)
        machine, smollm2 = profile(), cache_dir() / "smollm2-135m"
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        record = {
            "complete": given == EVERYTHING,
            "command": shlex.join(["pytest", *given]),
            "date": datetime.now(UTC).date().isoformat(),
            "device": f"{cores} CPU cores" if machine.device == "cpu" else machine.name,
            "system": platform.system(),
            "versions": {"python": platform.python_version(), **_versions()},
            "off_lock": off_lock((ROOT / "constraints.txt").read_text(encoding="utf-8")),
            "bytes": {
                "packages": _bytes_of_packages("lora-lab", frozenset({"lab"}), set()),
                "model": sum(file.stat().st_size for file in smollm2.glob("*") if file.is_file()),
            },
            "seconds": round(time.monotonic() - self.start),
            "tests": {
                "passed": tests["passed"],
                "failed": tests["failed"],
                "skipped": dict(sorted(self.skips.items())),
            },
            "failed": [item.nodeid for item, got in self.outcomes.items() if got == "failed"],
            "notebooks": dict(sorted(self.notebooks.items())),
        }
        atomic_write_text(self.file, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        self.message = f"results in {self.file}"

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_line(self.message)
