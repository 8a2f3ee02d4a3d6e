# Sourced by the launch scripts: their help, and a look at a command before anything starts for it.
# shellcheck shell=bash

# print_help FILE: the comment at a script's head.
print_help() { awk 'NR > 1 && !/^#/ { exit } NR > 1 && !/^#SBATCH/ { sub(/^# ?/, ""); print }' "$1"; }

# check_command PYTHON FOLDER COMMAND ARGUMENT...: asks `variator COMMAND --check` in that folder.
# Fails with variator's own message. Where nobody can be asked it says so, and succeeds.
check_command() {
  local python="$1" folder="$2" told code=0
  shift 2
  if ! (cd "$folder" && "$python" -c 'import variator_jax') >/dev/null 2>&1; then
    echo "warning: the command is not checked, for $python has no variator_jax." >&2
    return 0
  fi
  # A login node, or one's own machine, has not the run's devices, and they are not asked for.
  told="$(cd "$folder" && JAX_PLATFORMS=cpu "$python" -m variator_jax "$1" --check --multiprocess \
    "${@:2}" 2>&1 >/dev/null </dev/null)" || code=$?
  case "$code" in
    0) ;;
    2)
      echo "error: ${told##*error: }" >&2
      echo "Nothing was started. Where that is wrong, --no-check starts without looking." >&2
      return 2
      ;;
    *) echo "warning: the command is not checked: $python ended with exit code $code." >&2 ;;
  esac
}
