"""Write what a full run found into the README: `pytest --results .github/results.json && python .github/results.py`.

Between the two markers of the README, the last column of the table becomes the seconds that each notebook took, and the
paragraph "Where the results were measured" is written anew. All else stays as it is.
"""

import json
import re
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECORD = ROOT / ".github" / "results.json"
MARKERS = ("<!-- results:begin -->", "<!-- results:end -->")
NAMED = ("torch", "transformers", "peft", "bitsandbytes")  # the versions that the README names; the record has all


def check(record: dict, notebooks: set[str]) -> None:
    """Raise ValueError unless the record is of a full run in which nothing failed, over these notebooks."""
    if not record["complete"]:
        raise ValueError(f"the record is of a part, `{record['command']}`: record `pytest --results FILE`, all of it")
    failed = [name for name, found in record["notebooks"].items() if found["failed"]]
    if failed or record["tests"]["failed"]:
        raise ValueError(f"the record has failures, in {record['tests']['failed']} tests and the notebooks {failed}")
    if other := set(record["notebooks"]) ^ notebooks:
        raise ValueError(f"the record and the folder notebooks differ in {sorted(other)}: run again")


def paragraph(record: dict) -> str:
    """Return the paragraph on where the results come from."""
    day, versions = date.fromisoformat(record["date"]), record["versions"]
    names = [f"{name} {versions[name].split('+')[0]}" for name in NAMED]
    skipped = [f"{count} ({reason})" for reason, count in record["tests"]["skipped"].items()]
    cells, uncompared = (sum(found[key] for found in record["notebooks"].values()) for key in ("passed", "uncompared"))
    return (
        f"**Where the results were measured.** On {day.day} {day:%B %Y}, on a {record['system']} machine with "
        f"{record['device']}, Python {versions['python'].rpartition('.')[0]}, {', '.join(names[:-1])} and {names[-1]}: "
        f"all {cells:,} code cells of the notebooks ran and printed what is stored in them ({uncompared} are left "
        f"uncompared, since what they print depends on the machine), and {record['tests']['passed']:,} tests passed, "
        f"in {record['seconds'] / 60:.0f} minutes altogether. "
        + (f"Tests skipped: {', '.join(skipped)}. " if skipped else "")
        + "The seconds of the table are from that run; its [record](.github/results.json) also has the losses. "
        "The paths for NVIDIA and Apple GPUs are written, but no result here has been measured on one yet."
    )


def render(readme: str, record: dict) -> str:
    """Return the README with the record's numbers between the markers. Raises ValueError where there is no place."""
    begin, end = (readme.find(marker) for marker in MARKERS)
    if not 0 <= begin < end:
        raise ValueError(f"README.md: the lines {MARKERS[0]} and {MARKERS[1]}, in this order, are missing")
    text = readme[begin:end]
    for name, found in record["notebooks"].items():
        row = rf"^(\|.*\(notebooks/{name}\.ipynb\).*\| )[^|\n]*\|$"
        text, rows = re.subn(row, rf"\g<1>{found['seconds']:.0f} |", text, flags=re.M)
        if rows != 1:
            raise ValueError(f"README.md: between the markers, the table is to have one row for {name}.ipynb")
    written = paragraph(record)
    text, paragraphs = re.subn(r"^\*\*Where the results were measured\.\*\*.*$", lambda _: written, text, flags=re.M)
    if paragraphs != 1:
        raise ValueError("README.md: between the markers, a paragraph **Where the results were measured.** is missing")
    return readme[:begin] + text + readme[end:]


if __name__ == "__main__":
    from helpers.folders import write_whole

    record = json.loads(RECORD.read_text(encoding="utf-8"))
    check(record, {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")})
    write_whole(ROOT / "README.md", render((ROOT / "README.md").read_text(encoding="utf-8"), record))
