"""The entry point of ``python -m spap_jax``, which does the same as ``spap``."""

import sys

from spap_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
