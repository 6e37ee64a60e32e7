"""`python -m lasp`: the command `lasp`."""

import sys

from lasp.launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
