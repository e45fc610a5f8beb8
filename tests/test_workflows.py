"""No test is left out: what .github/workflows run, read from their commands and compared with what there is to run.

`faults` and `left_out` find what is wrong; the tests below hold them against the repository, and then break one thing
after the other to see that it is found.
"""

import copy
import json
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path

import conftest

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
PYTEST = PYPROJECT["tool"]["pytest"]["ini_options"]
DEFAULT_MARKERS = PYTEST["addopts"][PYTEST["addopts"].index("-m") + 1]
MARKERS = dict(line.split(": ", 1) for line in PYTEST["markers"])
GROUPS = set(re.findall(r"\w+", DEFAULT_MARKERS)) - {"not", "or"}  # what `pytest` alone leaves out
NOTEBOOKS = sorted(f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb"))
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / ".github" / "workflows").glob("*.yml")}
SYSTEMS = {"ubuntu": "Linux", "macos": "macOS", "windows": "Windows"}
CONDITIONS = {"runner.os == 'Linux'", "runner.os != 'Linux'"}  # those that a step with pytest may have


@dataclass
class Command:
    """One `pytest …` of a workflow."""

    workflow: str
    paths: list[str]
    markers: str
    lax: bool
    systems: set[str]
    triggers: set[str]
    extras: set[str]

    def selects(self, path: str, markers: set[str]) -> bool:
        named = any(path == given or path.startswith(f"{given}/") for given in self.paths)
        names = {name: name in markers for name in re.findall(r"\w+", self.markers)}
        return named and eval(self.markers, {"__builtins__": {}}, names)  # `not (a or b)` means the same in Python

    def can_run(self, markers: set[str]) -> bool:
        """Whether the machine has what pyproject.toml says of the markers: a GPU, an extra."""
        needs = {extra for marker in markers & set(MARKERS) for extra in re.findall(r"extra (\w+)", MARKERS[marker])}
        return needs <= self.extras and ("cuda" not in markers or self.systems == {"gpu"})


def _triggers(workflow):
    """Its events, without those that a filter keeps from some changes."""
    events = workflow[True]  # YAML reads the key `on` as true
    events = dict.fromkeys(events) if isinstance(events, list) else events
    filters = {"paths", "paths-ignore", "branches-ignore", "tags"}
    return {
        event for event, options in events.items() if not filters & set(options if isinstance(options, dict) else ())
    }


def _systems(job, condition):
    runs_on = job["runs-on"]
    if isinstance(runs_on, list):
        return {"gpu"} if runs_on == ["self-hosted", "gpu"] else set()
    images = job["strategy"]["matrix"]["os"] if "matrix.os" in runs_on else [runs_on]
    systems = {SYSTEMS[image.split("-")[0]] for image in images}
    return {system for system in systems if not condition or (system == "Linux") == ("==" in condition)}


def _extras(runs):
    found = {name for names in re.findall(r"\[([\w,-]+)\]", "\n".join(runs)) for name in names.split(",")} & set(EXTRAS)
    for _ in EXTRAS:  # an extra may name others
        found |= {name for extra in found for name in re.findall(r"lora-lab\[(\w+)\]", "\n".join(EXTRAS[extra]))}
    return found


def _read(words, name):
    """Return paths, markers and laxness of a pytest command. Raises ValueError for an option that could hide a test."""
    paths, markers, lax, words = [], DEFAULT_MARKERS, False, iter(words)
    for word in words:
        if word == "-m":
            markers = next(words)
        elif word == "--nbval-lax":
            lax = True
        elif word == "--results":
            next(words)
        elif word.startswith("-"):
            if not re.fullmatch(r"-v|-q|-ra|--durations=\d+", word):
                raise ValueError(f"{name}: pytest with {word}, which could leave tests out")
        elif not (ROOT / word).exists():
            raise ValueError(f"{name}: pytest is given {word}, which does not exist")
        else:
            paths.append(word.rstrip("/"))
    return paths or PYTEST["testpaths"], markers, lax


def commands(workflows):
    """Return every pytest command. Raises ValueError for one that might not run, or whose failure might not count."""
    found = []
    for name, workflow in workflows.items():
        for job in workflow["jobs"].values():
            for number, step in enumerate(job["steps"]):
                lines = step.get("run", "").replace("\\\n", " ").strip().splitlines()
                for line in [line for line in lines if re.search(r"\bpytest\b", line)]:
                    words = shlex.split(line, comments=True)
                    if "install" in words and not re.search("[|;&]", line):
                        continue
                    words = words[2:] if words[:2] == ["python", "-m"] else words
                    if words[0] != "pytest" or line != lines[-1] or re.search(r"[|;&<>$`]", line):
                        raise ValueError(f"{name}: `{line}` is to be a plain pytest command, the last line of its step")
                    if step.get("if", "") and step["if"] not in CONDITIONS:
                        raise ValueError(f"{name}: a condition on {line}: {step['if']}")
                    if "if" in job or "needs" in job:
                        raise ValueError(f"{name}: a condition on the job of {line}")
                    runs = [earlier.get("run", "") for earlier in job["steps"][:number]]
                    systems = _systems(job, step.get("if"))
                    found.append(Command(name, *_read(words[1:], name), systems, _triggers(workflow), _extras(runs)))
    return found


def left_out(items, workflows):
    """Return what no workflow runs by itself, of `items`: {path: the marker sets of its tests}."""
    given = commands(workflows)
    missing = []
    for path, sets in items.items():
        for markers in sets:
            able = [command for command in given if command.selects(path, markers) and command.can_run(markers)]
            if "cuda" in markers:  # such a machine is there when someone starts one
                enough = any("workflow_dispatch" in command.triggers for command in able)
            elif markers & GROUPS:
                enough = any("schedule" in command.triggers for command in able)
            else:  # with every pull request, and notebooks with their outputs compared
                checked = [command for command in able if not (path in NOTEBOOKS and command.lax)]
                enough = any("pull_request" in command.triggers and "Linux" in command.systems for command in checked)
                enough = enough and any("schedule" in command.triggers for command in checked)
            if not enough:
                missing.append((path, *sorted(markers & set(MARKERS))))
    for path in NOTEBOOKS:  # and each notebook on every system, and on a GPU
        running = [command.systems for command in given if command.selects(path, set())]
        for system in {"Linux", "macOS", "Windows", "gpu"}.difference(*running):
            missing.append((path, system))
    return missing


def faults(text):
    """Return what is wrong with a workflow, whatever it runs: rights, versions, time limits, failures hidden."""
    workflow = yaml.safe_load(text)
    found = []
    if workflow["permissions"] != {}:
        found.append("permissions: {} first, and then what each job needs")
    if "concurrency" not in workflow:
        found.append("no concurrency: two runs at once")
    for name, job in workflow["jobs"].items():
        rights = job.get("permissions")
        deploys = (
            rights == {"pages": "write", "id-token": "write"}
            and job.get("environment", {}).get("name") == "github-pages"
        )
        if rights != {"contents": "read"} and not deploys:
            found.append(f"{name}: permissions {rights}")
        if not 0 < job.get("timeout-minutes", 0) <= 120:
            found.append(f"{name}: timeout-minutes from 1 to 120")
        if "self-hosted" in job["runs-on"] and set(workflow[True]) != {"workflow_dispatch"}:
            found.append(f"{name}: other people's code must not reach our own machine")
        for step in job["steps"]:
            if "${{" in step.get("run", ""):
                found.append(f"{name}: an expression in a command: give it through env")
            if (
                "actions/checkout@" in step.get("uses", "")
                and step.get("with", {}).get("persist-credentials") is not False
            ):
                found.append(f"{name}: persist-credentials: false")
    for environment in re.findall(r"^ *(CI|PYTEST_ADDOPTS) *:", text, flags=re.M):
        found.append(f"{environment} is set")
    for hidden in re.findall(r"continue-on-error|\|\| *(?:true|:)|set \+e|pull_request_target|workflow_run", text):
        found.append(hidden)
    if re.search(r"\bif: *(\$\{\{)? *['\"]?(false|0)\b", text):
        found.append("if: false")
    for action in re.findall(r"uses: (.+)", text):
        if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", action):
            found.append(f"{action}: pin it by its commit, with the version after it")
    for minute in re.findall(r'cron: "(\S+)', text):
        if not re.fullmatch(r"[1-9]|[1-5]\d", minute):
            found.append("scheduled on the hour, when GitHub drops runs")
    for event in ("pull_request", "push"):
        for pattern in ((workflow[True] or {}).get(event) or {}).get("paths", []):
            if not any(ROOT.glob(pattern)):
                found.append(f"paths: {pattern} matches no file")
    return found


WORKFLOWS = {name: yaml.safe_load(text) for name, text in TEXTS.items()}


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_each_workflow_has_least_rights_and_hides_no_failure(name):
    assert faults(TEXTS[name]) == []


def test_each_action_has_one_version():
    pins = {tuple(use.split("@")) for text in TEXTS.values() for use in re.findall(r"uses: (\S+)", text)}
    assert len(pins) == len({action for action, _ in pins})


def test_every_collected_test_and_notebook_is_run_by_a_workflow(request):
    """Of the files that this run was given: `pytest` alone looks at all of them."""
    items = request.config.stash[conftest.COLLECTED]
    assert left_out(items, WORKFLOWS) == []


def test_every_file_with_tests_is_collected(request):
    """A file that skips itself as a whole, or that pytest does not see, has no tests here."""
    given = [(Path(request.config.invocation_params.dir) / arg.split("::")[0]).resolve() for arg in request.config.args]
    files = [*(ROOT / "tests").glob("*.py"), *(ROOT / "notebooks").glob("*.ipynb")]
    shared = {"exercises.py"}
    for file in files:
        if file.name not in shared and any(file == arg or arg in file.parents for arg in given):
            assert str(file.relative_to(ROOT).as_posix()) in request.config.stash[conftest.COLLECTED], file.name
    assert not [path for folder in ("helpers", ".github", "docs") for path in (ROOT / folder).rglob("test_*.py")]
    for name in shared:
        assert not re.search(r"^def test_", (ROOT / "tests" / name).read_text(encoding="utf-8"), flags=re.M)


def test_every_group_has_its_own_command():
    """Whatever this run has collected: a marker that no workflow names is a group that nobody runs."""
    assert PYTEST["testpaths"] == ["tests", "notebooks"]
    assert re.fullmatch(r"not \(\w+( or \w+)*\)", DEFAULT_MARKERS)
    assert {"cuda", *GROUPS} <= {command.markers for command in commands(WORKFLOWS)}
    for word in PYTEST["addopts"]:
        assert not re.match(r"-k|--ignore|--deselect|-p", word)


def test_every_reason_to_skip_that_is_allowed_is_in_use_and_is_run_somewhere():
    tests = "".join(path.read_text(encoding="utf-8") for path in [ROOT / "conftest.py", *(ROOT / "tests").glob("*.py")])
    for reason in {*conftest.ALLOWED_SKIPS, *conftest.ALLOWED_ELSEWHERE}:
        assert re.search(rf"(reason=|skip\)?\(){re.escape(json.dumps(reason))}", tests), reason
    for where in conftest.ALLOWED_SKIPS.values():
        assert set(re.findall(r"\w+\.yml", where)) <= set(WORKFLOWS), where


def test_the_linters_of_the_workflows_are_run():
    runs = "\n".join(step.get("run", "") for job in WORKFLOWS["tests.yml"]["jobs"].values() for step in job["steps"])
    assert re.search(r"^zizmor --offline \.github$", runs, flags=re.M)
    assert re.search(r"^actionlint$", runs, flags=re.M)


def test_the_links_of_the_readme_and_of_the_notebooks_are_checked():
    text = TEXTS["links.yml"]
    assert "schedule" in WORKFLOWS["links.yml"][True]
    assert re.search(r"run: jupyter nbconvert --to markdown .*notebooks/\*\.ipynb\n", text)
    assert re.search(r"run: lychee .* README\.md .*'notebooks/\*\.md'\n", text)


ITEMS = {"tests/test_lora.py": [set()], "notebooks/00_start_here.ipynb": [set()], "tests/test_memory.py": [{"cuda"}]}


# Without the job that also runs the package's tests on Linux, so that each test is run by one command.
ALONE = TEXTS | {"tests.yml": TEXTS["tests.yml"].split("\n  lowest:")[0] + "\n"}


def _with(text, old, new):
    assert old in text, old
    return text.replace(old, new)


@pytest.mark.parametrize(
    ("name", "old", "new", "missing"),
    [
        ("tests.yml", "run: pytest\n", "run: pytest notebooks\n", ("tests/test_lora.py",)),
        ("tests.yml", "run: pytest\n", "run: pytest tests\n", ("notebooks/00_start_here.ipynb",)),
        ("tests.yml", "run: pytest\n", "run: pytest --nbval-lax\n", ("notebooks/00_start_here.ipynb",)),
        ("tests.yml", "run: pytest\n", "run: pytest -m 'not cuda and site'\n", ("tests/test_lora.py",)),
        ("tests.yml", "run: pytest notebooks --nbval-lax", "run: ls", ("notebooks/00_start_here.ipynb", "macOS")),
        ("tests.yml", "  pull_request:\n", "  pull_request:\n    paths: [helpers/**]\n", ("tests/test_lora.py",)),
        ("weekly.yml", "run: pytest --results results.json\n", "run: ls\n", ("notebooks/00_start_here.ipynb",)),
        ("gpu.yml", "pytest -m cuda", "pytest tests/test_memory.py -m site", ("tests/test_memory.py", "cuda")),
        ("gpu.yml", "[self-hosted, gpu]", "ubuntu-latest", ("tests/test_memory.py", "cuda")),
    ],
)
def test_a_command_that_leaves_tests_out_is_found(name, old, new, missing):
    assert left_out(ITEMS, {name: yaml.safe_load(text) for name, text in ALONE.items()}) == []
    changed = WORKFLOWS | {name: yaml.safe_load(_with(ALONE[name], old, new))}
    assert missing in left_out(ITEMS, changed)


@pytest.mark.parametrize(
    ("marker", "name"), [(group, name) for group in sorted(GROUPS) for name in TEXTS if f"-m {group}" in TEXTS[name]]
)
def test_a_group_whose_job_is_gone_is_found(marker, name):
    """Also when the extra that the group needs is not installed, or the schedule is gone."""
    items = {"tests/test_lora.py": [{marker}]}
    assert left_out(items, WORKFLOWS) == []
    without = {other: copy.deepcopy(workflow) for other, workflow in WORKFLOWS.items()}
    for workflow in without.values():
        workflow[True] = {event: options for event, options in workflow[True].items() if event != "schedule"}
    assert left_out(items, without)
    if re.search(r"extra (\w+)", MARKERS[marker]):
        text = re.sub(r"\[(lab,test),[\w,]+\]", r"[\1]", TEXTS[name])
        assert left_out(items, WORKFLOWS | {name: yaml.safe_load(text)})


@pytest.mark.parametrize(
    "line",
    [
        "pytest -k lora",
        "pytest --ignore tests/test_lora.py",
        "pytest --deselect tests/test_lora.py",
        "pytest --collect-only",
        "pytest -x",
        "pytest -p no:nbval",
        "pytest || echo",
        "pytest | tee log",
        "pytest; ls",
        "pytest\nls",
        "pytest tests/test_none.py",
        "pytest $FILES",
        "PYTEST_ADDOPTS=-x pytest",
        "timeout 60 pytest",
    ],
)
def test_a_command_that_could_hide_a_test_is_refused(line):
    broken = copy.deepcopy(WORKFLOWS)
    broken["tests.yml"]["jobs"]["lowest"]["steps"][-1]["run"] = line
    with pytest.raises(ValueError, match=r"^tests\.yml: "):
        commands(broken)


@pytest.mark.parametrize("where", ["step", "job"])
def test_a_condition_on_tests_is_refused(where):
    broken = copy.deepcopy(WORKFLOWS)
    job = broken["tests.yml"]["jobs"]["lowest"]
    (job if where == "job" else job["steps"][-1])["if"] = "github.actor == 'me'"
    with pytest.raises(ValueError, match=r"a condition on"):
        commands(broken)


@pytest.mark.parametrize(
    ("name", "old", "new", "fault"),
    [
        ("tests.yml", "permissions: {}", "permissions: read-all", "permissions: {} first"),
        ("tests.yml", "      contents: read", "      contents: write", "permissions {'contents': 'write'}"),
        ("tests.yml", "concurrency:", "on-hold:", "no concurrency"),
        ("tests.yml", "    timeout-minutes: 60\n", "", "timeout-minutes"),
        ("tests.yml", "persist-credentials: false", "persist-credentials: true", "persist-credentials"),
        ("tests.yml", "@3d3c42e5aac5ba805825da76410c181273ba90b1 # v7.0.1", "@v7", "pin it by its commit"),
        ("tests.yml", "run: pytest tests", "run: pytest tests || true", "|| true"),
        ("tests.yml", "run: pytest\n", "run: pytest\n        continue-on-error: true\n", "continue-on-error"),
        ("tests.yml", "if: runner.os == 'Linux'\n", "if: false\n", "if: false"),
        ("tests.yml", "  pull_request:\n", "  pull_request_target:\n", "pull_request_target"),
        ("tests.yml", "  pull_request:\n", "  pull_request:\n    paths: [lessons/**]\n", "lessons/** matches no file"),
        ("tests.yml", "run: ruff check .", 'run: ruff check "${{ github.head_ref }}"', "an expression in a command"),
        ("tests.yml", "  LORA_LAB_CACHE:", "  CI: ''\n  LORA_LAB_CACHE:", "CI is set"),
        ("weekly.yml", '"23 5', '"0 5', "on the hour"),
        ("gpu.yml", "  workflow_dispatch:", "  pull_request:\n  workflow_dispatch:", "our own machine"),
    ],
)
def test_a_fault_is_found(name, old, new, fault):
    assert any(fault in found for found in faults(_with(TEXTS[name], old, new)))
