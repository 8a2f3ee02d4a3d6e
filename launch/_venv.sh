# Sourced by the launch scripts: makes the `.venv` of the repository.
# shellcheck shell=bash

# The root of the repository.
ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"

# Prints the first interpreter that is Python 3.11 to 3.13, the tested ones; $PYTHON, if set, goes
# first.
find_python() {
  local candidate known
  known='import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python; do
    if [[ -n "$candidate" ]] && "$candidate" -c "$known" >/dev/null 2>&1; then
      printf '%s\n' "$candidate"
      return 0
    fi
  done
  echo "error: no Python 3.11 to 3.13 with the module venv found (looked for \$PYTHON, python3," \
    "python3.11 to python3.13). On Debian and Ubuntu: apt-get install python3 python3-venv." >&2
  return 1
}

# prepare_venv EXTRA: makes $ROOT/.venv and installs variator_jax[EXTRA] into it, editable, unless
# that has been done and setup.py has not changed since.
prepare_venv() {
  local extra="$1" venv="$ROOT/.venv" setup stamp python
  setup="$(<"$ROOT/setup.py")"
  for stamp in "$venv/.installed-$extra" "$venv/.installed-dev"; do  # dev includes the others.
    if [[ -f "$stamp" && "$(<"$stamp")" == "$setup" ]]; then
      return 0
    fi
  done
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python="$(find_python)"
    echo "Making .venv with $("$python" --version)."
    "$python" -m venv "$venv"
  fi
  echo "Installing variator_jax[$extra] into .venv; the first time takes a few minutes."
  "$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check \
    --editable "${ROOT}[$extra]" </dev/null
  rm -rf "$ROOT/build" "$ROOT/variator_jax.egg-info"
  printf '%s\n' "$setup" >"$venv/.installed-$extra"
}
