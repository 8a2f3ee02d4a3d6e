"""`python -m variator_jax`: the same as the command `variator`."""

import sys

from variator_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
