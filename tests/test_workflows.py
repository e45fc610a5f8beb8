"""No test is left out: each group has a workflow, and each reason to skip is run somewhere.

Rights, pins and injections are zizmor's part and mistakes in the files actionlint's; tests.yml runs both.
"""

import json
import re
import tomllib
from pathlib import Path

import conftest

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PYTEST = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
LEFT_OUT = PYTEST["addopts"][PYTEST["addopts"].index("-m") + 1]  # "not (browser or colab or …)"
GROUPS = sorted(set(re.findall(r"\w+", LEFT_OUT)) - {"not", "or"})
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / ".github" / "workflows").glob("*.yml")}


def runs(name):
    """The commands of a workflow, a line each, comments left out."""
    jobs = yaml.safe_load(TEXTS[name])["jobs"].values()
    return [line.strip() for job in jobs for step in job["steps"] for line in step.get("run", "").splitlines()]


def test_bare_pytest_runs_on_every_pull_request_and_every_week():
    assert PYTEST["testpaths"] == ["tests", "notebooks"]
    assert not [word for word in PYTEST["addopts"] if re.match(r"-k|--ignore|--deselect|-p|-x", word)]
    assert "pytest --slow" in runs("tests.yml")
    assert "paths" not in str(yaml.safe_load(TEXTS["tests.yml"])[True])  # YAML reads the key `on` as true
    assert "pytest --slow --results results.json" in runs("weekly.yml")
    assert {"zizmor --offline .github", "actionlint"} <= set(runs("tests.yml"))


@pytest.mark.parametrize("group", [*GROUPS, "cuda"])
def test_every_group_that_bare_pytest_leaves_out_has_a_job(group):
    found = [name for name in TEXTS if any(line.split()[:3] == ["pytest", "-m", group] for line in runs(name))]
    assert found
    if group != "cuda":  # a machine with a GPU is there when someone starts one
        assert any("schedule" in yaml.safe_load(TEXTS[name])[True] for name in found)


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_no_failure_of_a_workflow_is_hidden(name):
    """What the linters let pass."""
    assert not re.findall(
        r"continue-on-error|\|\| *(?:true|:)|set \+e|^ *(?:CI|PYTEST_ADDOPTS) *:", TEXTS[name], flags=re.M
    )
    for job in yaml.safe_load(TEXTS[name])["jobs"].values():
        assert 0 < job["timeout-minutes"] <= 120
        if "self-hosted" in job["runs-on"]:  # other people's code must not reach our own machine
            assert set(yaml.safe_load(TEXTS[name])[True]) == {"workflow_dispatch"}


def test_every_reason_to_skip_that_is_allowed_is_in_use_and_is_run_somewhere():
    tests = "".join(path.read_text(encoding="utf-8") for path in [ROOT / "conftest.py", *(ROOT / "tests").glob("*.py")])
    for reason in {*conftest.ALLOWED_SKIPS, *conftest.ALLOWED_ELSEWHERE}:
        assert re.search(rf"(reason=|skip\)?\(){re.escape(json.dumps(reason))}", tests), reason
    for where in conftest.ALLOWED_SKIPS.values():
        assert set(re.findall(r"\w+\.yml", where)) <= set(TEXTS), where
