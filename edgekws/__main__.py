"""`python -m edgekws`: the same as the command `edgekws`."""

import sys

from edgekws.cli import main

sys.exit(main())
