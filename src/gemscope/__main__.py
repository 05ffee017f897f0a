"""`python -m gemscope`."""

import sys

from gemscope.cli import main

sys.exit(main())
