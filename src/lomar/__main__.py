"""`python -m lomar` is the command `lomar`."""

import sys

from lomar.cli import main

sys.exit(main())
