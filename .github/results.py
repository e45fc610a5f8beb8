"""Write the README's tables from the records of runs: `python .github/results.py`.

A record is what `pytest --results .github/results/NAME.json` writes. Between the README's two markers, the last column
of the table of notebooks becomes the seconds that each took with the lock, and the part that begins with "**Where the
results were measured.**" is written anew: one row for each record. All else stays as it is.
"""

import json
import re
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / ".github" / "results"
MARKERS = ("<!-- results:begin -->", "<!-- results:end -->")
HEADING = "**Where the results were measured.**"
SETS = {  # the records, and how the README calls their versions
    "lowest": "lowest that `pyproject.toml` allows",
    "colab-2026-06": "Colab, June 2026",
    "colab-2026-08": "Colab, August 2026",
    "lock": "`constraints.txt`",
    "newest": "newest of the day",
}
NAMED = ("python", "torch", "transformers", "peft", "accelerate", "bitsandbytes")


def row(name: str, record: dict) -> str:
    """Return a record's row of the table of versions."""
    day, versions = date.fromisoformat(record["date"]), [record["versions"][name].split("+")[0] for name in NAMED]
    cells = {key: sum(found[key] for found in record["notebooks"].values()) for key in ("passed", "failed")}
    what = "tests, notebooks" if record["notebooks"] else "tests"
    if "--nbval-lax" in record["command"]:
        what += " (run, outputs not compared)"
    passed, failed = (record["tests"][key] + cells[key] for key in ("passed", "failed"))
    link = f"[{SETS[name]}](.github/results/{name}.json)"
    return f"| {' | '.join([link, *versions, f'{day.day} {day:%b %Y}', what, f'{passed:,}', f'{failed:,}'])} |"


def part(records: dict[str, dict]) -> str:
    """Return the heading, the table of versions, and what the run with the lock says beside it."""
    lock = records["lock"]
    cells, uncompared = (sum(found[key] for found in lock["notebooks"].values()) for key in ("passed", "uncompared"))
    skipped = [f"{count} ({reason})" for reason, count in lock["tests"]["skipped"].items()]
    exactly = "exactly those of `constraints.txt`" if not lock["off_lock"] else f"not the lock's: {lock['off_lock']}"
    return "\n".join(
        [
            f"{HEADING} {lock['system']}, {lock['device']}; each row links to the record of its run.",
            "",
            "| versions | Python | " + " | ".join(NAMED[1:]) + " | date | what ran | passed | failed |",
            "|---|---|" + "---|" * len(NAMED[1:]) + "---|---|---:|---:|",
            *(row(name, records[name]) for name in SETS if name in records),
            "",
            f"The seconds of the notebooks are from the run with the lock (its versions are {exactly}), "
            f"{lock['seconds'] / 60:.0f} minutes in all: {cells:,} code cells printed what is stored in them "
            f"({uncompared} of them are left uncompared, since what they print depends on the machine). "
            + (f"Tests skipped: {', '.join(skipped)}. " if skipped else "")
            + "No result here has been measured on an NVIDIA or Apple GPU yet.",
        ]
    )


def render(readme: str, records: dict[str, dict]) -> str:
    """Return the README with the records' numbers between the markers. Raises ValueError where there is no place."""
    begin, end = (readme.find(marker) for marker in MARKERS)
    if not 0 <= begin < end:
        raise ValueError(f"README.md: the lines {MARKERS[0]} and {MARKERS[1]}, in this order, are missing")
    notebooks, heading, _ = readme[begin:end].partition(HEADING)
    if not heading:
        raise ValueError(f"README.md: between the markers, a part {HEADING} is missing")
    for name, found in records["lock"]["notebooks"].items():
        line = rf"^(\|.*\(notebooks/{name}\.ipynb\).*\| )[^|\n]*\|$"
        notebooks, rows = re.subn(line, rf"\g<1>{found['seconds']:.0f} |", notebooks, flags=re.M)
        if rows != 1:
            raise ValueError(f"README.md: between the markers, the table is to have one row for {name}.ipynb")
    return f"{readme[:begin]}{notebooks}{part(records)}\n\n{readme[end:]}"


def stored() -> dict[str, dict]:
    """Return the stored records."""
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(RECORDS.glob("*.json"))}


if __name__ == "__main__":
    from helpers.finetune.folders import atomic_write_text

    atomic_write_text(ROOT / "README.md", render((ROOT / "README.md").read_text(encoding="utf-8"), stored()))
