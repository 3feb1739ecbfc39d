"""`python -m jedit` is `jedit`."""

import sys

from jedit.cli import main

if __name__ == "__main__":
    sys.exit(main())
