# Sourced by the launch scripts: help, errors, and checks of a command before anything starts.
# shellcheck shell=bash

fail() {
  echo "error: $*" >&2
  exit 2
}

# print_help FILE: the comment at a script's head.
print_help() { awk 'NR > 1 && !/^#/ { exit } NR > 1 && !/^#SBATCH/ { sub(/^# ?/, ""); print }' "$1"; }

# model_dir ARGUMENT...: the MODEL_DIR among a command's arguments, without quotes.
model_dir() {
  local argument
  for argument in "$@"; do
    [[ "$argument" != --gin.MODEL_DIR=* ]] || tr -d "\"'" <<<"${argument#*=}"
  done
}

# on_t5x ARGUMENT...: whether a command names the engine t5x.
on_t5x() { [[ " $* " == *" --engine"[=\ ]"t5x "* ]]; }

# check_command PYTHON FOLDER COMMAND ARGUMENT...: runs `variator COMMAND --check` in that folder.
# Fails with variator's own message. Where it cannot run it warns, and succeeds.
check_command() {
  local python="$1" folder="$2" output code=0
  shift 2
  if ! (cd "$folder" && "$python" -c 'import variator_jax') >/dev/null 2>&1; then
    echo "warning: the command is not checked: $python has no variator_jax." >&2
    return 0
  fi
  # This machine may lack the run's devices; the check asks for none.
  output="$(cd "$folder" && JAX_PLATFORMS=cpu "$python" -m variator_jax "$1" --check \
    --multiprocess "${@:2}" 2>&1 >/dev/null </dev/null)" || code=$?
  case "$code" in
    0) ;;
    2)
      echo "error: ${output##*error: }" >&2
      fail "nothing was started; --no-check starts without this check."
      ;;
    *) echo "warning: the command is not checked: $python ended with exit code $code." >&2 ;;
  esac
}
