"""`python -m helpers.finetune`: see script.py."""

import sys

from helpers.finetune.script import main

if __name__ == "__main__":
    sys.exit(main())
