"""Report a red weekly run: open an issue, or comment on the one that is open, through GitHub's `gh`.

It lists the versions that changed since the last green run of the workflow, from the lists that both runs have kept.
"""

import os
import subprocess
import tempfile
from pathlib import Path

TITLE = "The weekly run with the newest versions fails"


def gh(*arguments: str) -> str:
    """Return what a call of gh prints. Raises CalledProcessError where it fails."""
    return subprocess.run(["gh", *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def versions(run: str) -> dict[str, dict[str, str]]:
    """Return the versions that a run has kept, {list: {package: version}}; none where it has kept none."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            gh("run", "download", run, "--pattern", "versions *", "--dir", folder)
        except subprocess.CalledProcessError:
            return {}
        files = sorted(Path(folder).rglob("versions *.txt"))
        return {file.stem.removeprefix("versions "): packages(file.read_text(encoding="utf-8")) for file in files}


def packages(freeze: str) -> dict[str, str]:
    """Read the lines `name==version` and `name @ address`."""
    pairs = [line.replace(" @ ", "==", 1).partition("==") for line in freeze.splitlines() if line.strip()]
    return {name: version for name, _, version in pairs}


def report(run: str, green: str, now: dict[str, dict[str, str]], then: dict[str, dict[str, str]]) -> str:
    """Return the text of the issue."""
    lines = [f"[The run]({run}) failed. Last green run: {green or 'none yet'}."]
    for name, here in now.items():
        before = then.get(name, {})
        changed = [n for n in sorted(here.keys() | before.keys(), key=str.lower) if here.get(n) != before.get(n)]
        lines += ["", f"**{name}**: what changed since then"] if then else ["", f"**{name}**: all versions"]
        lines += [f"- {n}: {before.get(n, 'not there')} → {here.get(n, 'not there')}" for n in changed]
        lines += ["- nothing: look at the runner, or at a test that depends on chance"] if not changed else []
    return "\n".join(lines)


def main() -> None:
    """Compare this run with the last green one, and open or continue the issue."""
    server, repository, this = (os.environ[f"GITHUB_{name}"] for name in ("SERVER_URL", "REPOSITORY", "RUN_ID"))
    last = ["run", "list", "--workflow", "weekly.yml", "--status", "success", "--limit", "1", "--json", "databaseId"]
    green = gh(*last, "--jq", ".[].databaseId")
    text = report(f"{server}/{repository}/actions/runs/{this}", green, versions(this), versions(green) if green else {})
    search = ["issue", "list", "--state", "open", "--search", f'in:title "{TITLE}"', "--json", "number"]
    number = gh(*search, "--jq", ".[0].number // empty")
    if number:
        gh("issue", "comment", number, "--body", text)
    else:
        gh("issue", "create", "--title", TITLE, "--body", text)


if __name__ == "__main__":
    main()
