"""`python -m scalekd`, which is what torchrun starts."""

import sys

from scalekd.cli.app import main

sys.exit(main())
