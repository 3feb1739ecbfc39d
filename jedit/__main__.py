"""`python -m jedit` is `jedit`."""

import sys

from jedit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
