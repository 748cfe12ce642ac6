"""`python -m genfast`."""

import sys

from genfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
