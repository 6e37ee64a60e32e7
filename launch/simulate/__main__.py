"""`python -m lasp.launch.simulate`: published figures beside simulated ones, as in docs/planning.md."""

import sys

from lasp.launch.simulate.published import report

if __name__ == "__main__":
    print(report())
    sys.exit(0)
