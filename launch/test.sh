#!/usr/bin/env bash
# Style, types and tests. Arguments go to pytest:
#
#   bash launch/test.sh                        # everything
#   bash launch/test.sh tests/cli_test.py -v   # one file
#
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
prepare_venv dev
cd "$ROOT"
export PYTHONDONTWRITEBYTECODE=1
python="$ROOT/.venv/bin/python"

"$python" -m ruff check --no-cache .
"$python" -m mypy --cache-dir=/dev/null
# A file stays with one worker, so that what its tests share is made once. In their own order: sorted
# by the number of tests, the files of one long test would come last, beside an idle worker.
exec "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@" </dev/null
