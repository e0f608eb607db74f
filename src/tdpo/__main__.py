"""``python -m tdpo``, and with it ``accelerate launch -m tdpo`` and ``torchrun -m tdpo``."""

import sys

from tdpo.cli import program

sys.exit(program())
