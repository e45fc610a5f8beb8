"""`python -m helpers doctor` checks this machine; `fetch` and `room` prepare for a class without a network."""

from __future__ import annotations

import argparse
import sys

from helpers import __version__


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m helpers", description="LoRA Lab's command line.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="check Python, packages, hardware, disk, model cache and notebook kernel")
    commands.add_parser("fetch", help="download SmolLM2-135M-Instruct into the cache (LORA_LAB_CACHE)")
    room = commands.add_parser("room", help="collect packages, model and notebooks for machines without a network")
    room.add_argument("folder", help="the new folder")
    room.add_argument("--notebooks", help="the folder of the notebooks, such as a hand-out; default: notebooks")
    given = parser.parse_args(arguments)
    if given.command == "doctor":
        from helpers.commands.doctor import doctor

        return doctor()
    try:
        if given.command == "room":
            from helpers.commands.room import collect_room

            print(collect_room(given.folder, given.notebooks))
        else:
            from helpers.fetch import fetch_smollm2

            print(f"SmolLM2-135M-Instruct is in {fetch_smollm2()}")
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
