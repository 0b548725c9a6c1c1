"""``python -m fastif_ext``: the command line."""

import sys

from fastif_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
