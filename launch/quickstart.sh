#!/usr/bin/env bash
# From nothing but Python 3.11+ and gcc to a table and a plot: trains a small T5 backbone on the
# documentation that Python carries, compresses its encoder, and reports quality and speed.
#
#   bash launch/quickstart.sh            # works from any folder; called again, it resumes
#
# Arguments are handed on to `python -m variator_jax.commands.quickstart`; --help lists them.
set -euo pipefail

# shellcheck source=launch/_venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_venv.sh"

prepare_venv train
cd "$ROOT"
exec "$ROOT/.venv/bin/python" -m variator_jax.commands.quickstart "$@"
