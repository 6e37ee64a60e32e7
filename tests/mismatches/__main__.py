"""`python -m tests.mismatches`"""

import sys

from tests.mismatches.runner import main

main(sys.argv[1:])
