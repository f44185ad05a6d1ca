"""`python -m tunelet`: the same as the command `tunelet`."""

import sys

from tunelet.cli import main

sys.exit(main())
