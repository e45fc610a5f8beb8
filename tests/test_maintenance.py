"""What keeps the course true over time: the renewal of the lock, and the report of a red weekly run.

A renewal takes a quarter of an hour: here, what resolves and what runs the tests is replaced by a small world of three
packages. gh is replaced by a script.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / ".github" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


renew_lock, report_weekly = _load("renew_lock"), _load("report_weekly")

OLD = "# head\nalpha==1.0\nbeta==1.0\ndeep==1.0\ngamma==1.0 ; sys_platform == 'linux'\n"
NEWEST = {"alpha": "2.0", "beta": "2.0", "deep": "2.0"}
PROJECT = '[project]\ndependencies = ["alpha>=1", "beta"]\n[project.optional-dependencies]\nlab = ["gamma"]\n'


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A small course with a lock, and a world in which `broken(lock)` names the tests that fail with a lock."""
    root = tmp_path / "course"
    (root / ".github" / "results").mkdir(parents=True)
    (root / "constraints.txt").write_text(OLD)
    (root / "pyproject.toml").write_text(PROJECT)
    (root / ".github" / "results.py").write_text("open('README.md', 'w').write('new table')")
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    monkeypatch.setattr(renew_lock, "ROOT", root)

    def resolve(tree, old, packages):
        lines = []
        for line in old.splitlines():
            name = line.partition("==")[0]
            new = name in NEWEST and (not packages or name in packages or (name == "deep" and "alpha" in packages))
            lines.append(f"{name}=={NEWEST[name]}" if new else line)
        (tree / "constraints.txt").write_text("\n".join(lines) + "\n")

    asked: list[list[str]] = []

    def run_tests(tree, tests):
        asked.append(tests)
        failed = [test for test in course.broken((tree / "constraints.txt").read_text()) if not tests or test in tests]
        (tree / ".github" / "results").mkdir(exist_ok=True)
        (tree / ".github" / "results" / "lock.json").write_text(json.dumps({"failed": failed}))
        return failed

    monkeypatch.setattr(renew_lock, "resolve", resolve)
    monkeypatch.setattr(renew_lock, "run_tests", run_tests)
    course = type("Course", (), {"root": root, "asked": asked, "broken": staticmethod(lambda lock: [])})
    return course


def _files(root):
    return {path.name: path.read_text() for path in root.rglob("*") if path.is_file() and ".git" not in path.parts}


def test_a_green_renewal_replaces_lock_record_and_readme(course, capsys):
    assert renew_lock.main([]) == 0
    assert "alpha==2.0\nbeta==2.0" in (course.root / "constraints.txt").read_text()
    assert json.loads((course.root / ".github" / "results" / "lock.json").read_text()) == {"failed": []}
    assert (course.root / "README.md").read_text() == "new table"
    assert course.asked == [[]]  # all tests
    assert "alpha: ==1.0 -> ==2.0" in capsys.readouterr().out
    course.asked.clear()
    assert renew_lock.main([]) == 0
    assert course.asked == []
    assert "has the newest versions already" in capsys.readouterr().out


def test_only_the_packages_that_are_named_are_renewed(course):
    assert renew_lock.main(["beta"]) == 0
    assert "alpha==1.0\nbeta==2.0" in (course.root / "constraints.txt").read_text()


def test_a_red_renewal_changes_nothing_and_names_the_package(course, capsys):
    course.broken = lambda lock: ["tests/a.py::b", "notebooks/00.ipynb::Cell 3"] if "deep==2.0" in lock else []
    # The fake world knows a notebook's failure by its file as well, since that is how it is asked for again.
    broken = course.broken
    course.broken = lambda lock: broken(lock) + (["notebooks/00.ipynb"] if broken(lock) else [])
    before = _files(course.root)
    assert renew_lock.main([]) == 1
    assert _files(course.root) == before
    assert "Broken by the step of alpha." in capsys.readouterr().out  # deep comes with alpha, and nobody names deep
    assert course.asked == [[], *[["notebooks/00.ipynb", "tests/a.py::b"]] * 2]


def test_a_failure_that_no_step_alone_explains_is_said_to_be_one(course, capsys):
    course.broken = lambda lock: ["tests/a.py::b"] if "alpha==2.0\nbeta==2.0" in lock else []
    assert renew_lock.main([]) == 1
    assert "Broken by the step of none of these alone: alpha, beta." in capsys.readouterr().out


GH = """#!{python}
import json, pathlib, sys
with open({log!r}, "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1:3] == ["run", "list"]:
    print({green!r})
if sys.argv[1:3] == ["issue", "list"]:
    print({number!r})
if sys.argv[1:3] == ["run", "download"]:
    texts = {lists!r}[sys.argv[3]]
    for name, text in texts.items():
        folder = pathlib.Path(sys.argv[-1], name)
        folder.mkdir()
        (folder / f"versions {{name}}.txt").write_text(text)
    sys.exit(not texts)
"""
NOW = {"newest releases": "peft==2\nnew==1\ntorch==1\n", "main branches": "peft @ git+https://x@abc\ntorch==1\n"}
THEN = {"newest releases": "peft==1\ngone==3\ntorch==1\n", "main branches": "peft @ git+https://x@abc\ntorch==1\n"}


@pytest.mark.skipif(os.name == "nt", reason="needs file permissions as POSIX has them")
@pytest.mark.parametrize(("green", "number"), [("7", ""), ("7", "12"), ("", "")])
def test_a_red_week_is_reported_once(green, number, tmp_path, monkeypatch):
    log = tmp_path / "log"
    script = GH.format(python=sys.executable, log=str(log), green=green, number=number, lists={"8": NOW, "7": THEN})
    (tmp_path / "gh").write_text(script)
    (tmp_path / "gh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name, value in {"SERVER_URL": "https://git", "REPOSITORY": "o/n", "RUN_ID": "8"}.items():
        monkeypatch.setenv(f"GITHUB_{name}", value)
    report_weekly.main()
    last = json.loads(log.read_text().splitlines()[-1])
    assert last[:3] == (["issue", "comment", "12"] if number else ["issue", "create", "--title"])
    text = last[-1]
    assert text.startswith("[The run](https://git/o/n/actions/runs/8) failed.")
    if green:
        assert (
            "**newest releases**: what changed since then\n- gone: 3 → not there\n- new: not there → 1\n- peft: 1 → 2"
            in text
        )
        assert "**main branches**: what changed since then\n- nothing: look at the runner" in text
        assert "- torch" not in text
    else:
        assert "none yet" in text
        assert "- peft: not there → 2" in text
