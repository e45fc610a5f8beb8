"""Set the repository's address everywhere: `python .github/set_repository.py https://github.com/OWNER/NAME`.

The address in pyproject.toml (project.urls, Repository) is the one that counts. This command changes it there, in the
notebooks' badges and setup cells, and in every other file that git tracks: in all of them, or, if anything fails, in
none. No other byte changes, so that a second call with the old address restores the files. Python alone is enough.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def owner_and_name(address: str) -> str:
    """Return "OWNER/NAME" of an address, or raise ValueError."""
    found = re.fullmatch(r"https://github\.com/([A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?/[\w.-]*[\w-])", address, re.A)
    if not found or address.endswith(".git"):
        raise ValueError(f"{address!r} is not https://github.com/OWNER/NAME, with nothing after it")
    return found[1]


def changed_files(address: str) -> dict[Path, tuple[bytes, bytes]]:
    """Return the content before and after, for each file that the new address changes, or raise ValueError."""
    new = owner_and_name(address)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    old = owner_and_name(project["urls"]["Repository"])
    if new == old:
        return {}
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    found = {}
    for path in (ROOT / name for name in listing.decode().split("\0") if name):
        before = path.read_bytes()
        if _pattern(new).search(before):
            raise ValueError(f"{path} names {address} already, and could not be told apart from it later")
        after = _pattern(old).sub(lambda match: match[1] + new.encode(), before)
        if after != before:
            found[path] = before, after
    return found


def _pattern(name: str) -> re.Pattern[bytes]:
    """OWNER/NAME after github.com/, or after github/ in Colab's addresses, and not as the start of a longer name."""
    return re.compile(rb"(github(?:\.com)?/)" + re.escape(name.encode()) + rb"(?![\w-]|\.\w)")


def write(contents: dict[Path, tuple[bytes, bytes]]) -> None:
    """Write every file, or put back those that were written when one fails."""
    try:
        for path, (_, after) in contents.items():
            path.write_bytes(after)
    except BaseException:
        for path, (before, _) in contents.items():
            if path.read_bytes() != before:
                path.write_bytes(before)
        raise


def main(arguments: list[str]) -> str | None:
    """Run the command, and return an error message if it fails."""
    if len(arguments) != 1:
        return f"{(__doc__ or '').splitlines()[0]}"
    try:
        contents = changed_files(arguments[0])
        write(contents)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        return f"nothing was changed: {error}"
    for path in contents:
        print(path.relative_to(ROOT).as_posix())
    print(f"{arguments[0]} stands in {len(contents)} files now." if contents else "It is the address already.")
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
