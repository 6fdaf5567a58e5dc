"""``python -m fastattn``."""

import sys

from .cli import main

sys.exit(main())
