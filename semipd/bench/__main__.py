"""`python -m semipd.bench`."""

import sys

from semipd.bench.cli import main

if __name__ == "__main__":  # the processes of the HTTP client import this file too
    sys.exit(main())
