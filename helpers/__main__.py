"""`python -m helpers doctor` checks this machine; `python -m helpers fetch` prepares it for a class without network."""

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
    command = parser.parse_args(arguments).command
    if command == "doctor":
        from helpers.doctor import doctor

        return doctor()
    from helpers.fetch import fetch_smollm2

    try:
        print(f"SmolLM2-135M-Instruct is in {fetch_smollm2()}")
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
