#!/usr/bin/env bash
# From nothing but Python 3.11 to 3.13 with pip to a table and a plot: trains a small T5 backbone on
# the documentation that Python carries, compresses its encoder, and reports quality and speed.
#
#   bash launch/quickstart.sh            # works from any folder; called again, it resumes
#
#   --model_dir FOLDER   where all results go (default runs/quickstart, in the repository)
# The first call installs the packages into .venv.
set -euo pipefail

# shellcheck source=launch/_venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_venv.sh"
# shellcheck source=launch/_check.sh
source "$ROOT/launch/_check.sh"

if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then
  print_help "$0"
  exit 0
fi
prepare_venv train
cd "$ROOT"
exec "$ROOT/.venv/bin/python" -m variator_jax.commands.quickstart "$@"
