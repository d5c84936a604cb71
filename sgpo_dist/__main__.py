"""``python -m sgpo_dist`` is ``sgpo-dist``."""

from __future__ import annotations

import sys

from sgpo_dist.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
