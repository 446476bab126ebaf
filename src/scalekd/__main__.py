"""`python -m scalekd`, which is what torchrun starts."""

import sys

from .cli import main

sys.exit(main())
