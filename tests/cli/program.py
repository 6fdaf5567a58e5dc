"""``fastattn`` as a program file, for launchers that start one."""

import sys

from fastattn.cli import main

sys.exit(main())
