"""``python -m spap_jax`` is ``spap``."""

import sys

from spap_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
