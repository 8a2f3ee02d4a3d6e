#!/usr/bin/env bash
# Several processes on this machine, joined by JAX as on a pod: to try a multi-host run without one.
#
#   bash launch/local.sh 2 -- train --gin_file=nano_docs.gin --gin_file=runs/backbone.gin \
#     --gin.WARMUP_STEPS=1 --gin.TRAIN_STEPS=3 --gin.BATCH_SIZE=8 --gin.EVAL_BATCHES=1 \
#     --gin.MODEL_DIR=/tmp/variator_run
#
# That trains a tiny backbone on this Python's documentation for three steps, in a fresh clone.
# Arguments after -- are those of `variator`; each process gets its place in the run added to them.
#   --devices M     CPU devices of each process (default 1)
#   --grace S       seconds that the others have to end by themselves after one failed (default 45)
#   --program FILE  an executable that is run in place of `variator`
#   --no-check      start without checking the command
#   --dry-run       print what would be started, and stop
# Every line of output carries its process's index. The exit code is that of the process that failed
# first; 75 and 134, the codes of those that lost another, count only where there is no other code.
# Ctrl-C and SIGTERM go to all processes; the same command then continues from the newest checkpoint.
set -euo pipefail

# shellcheck source=launch/_venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_venv.sh"
# shellcheck source=launch/_check.sh
source "$ROOT/launch/_check.sh"

is_count() { [[ "$1" =~ ^[1-9][0-9]{0,3}$ ]]; }

if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then
  print_help "$0"
  exit 0
fi
count="${1:-}" devices=1 grace=45 program="" dry_run="" check=1
is_count "$count" || fail "expected the number of processes first, found '$count':" \
  "bash launch/local.sh 2 -- train --gin_file=nano_docs.gin"
shift
while (($#)) && [[ "$1" != -- ]]; do
  case "$1" in
    --dry-run) dry_run=1 ;;
    --no-check) check="" ;;
    --devices | --grace | --program)
      (($# > 1)) || fail "$1 needs a value."
      declare "${1#--}=$2"
      shift
      ;;
    *) fail "unknown argument '$1' before --; see --help." ;;
  esac
  shift
done
is_count "$devices" || fail "--devices $devices: expected a number of devices, such as 2."
is_count "$grace" || fail "--grace $grace: expected a number of seconds, such as 45."
[[ -z "$program" || -x "$program" ]] || fail "--program $program is not an executable."
(($# > 1)) || fail "no command given: the arguments of variator come after --."
shift # --

# XLA keeps the last of two equal flags, so the user's own stay except for this one.
export JAX_PLATFORMS=cpu PYTHONUNBUFFERED=1
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
run=("$program")
if [[ -z "$program" ]]; then
  [[ -n "$dry_run" ]] || prepare_venv train
  run=("$ROOT/.venv/bin/python" -m variator_jax)
  export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
  [[ -z "$check" ]] || check_command "${run[0]}" . "$@"
fi
port=PORT
[[ -n "$dry_run" ]] || port="$("$(find_python)" -c 'import socket
s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"

# compose INDEX ARGUMENT...: sets `line`. The place in the run follows the command's name, for a
# further -- may stand in the arguments.
compose() {
  line=("${run[@]}" "$2" "--coordinator_address=127.0.0.1:$port" "--process_count=$count"
    "--process_index=$1" "${@:3}")
}

if [[ -n "$dry_run" ]]; then
  echo "Would start $count processes with $devices CPU devices each, JAX_PLATFORMS=cpu:"
  for ((i = 0; i < count; i++)); do
    compose "$i" "$@"
    echo "[$i]$(printf ' %q' "${line[@]}")"
  done
  exit 0
fi

pids=() first="" deadline="" killing=""
exec 3>&2 # For this script's own lines; bash's notices of ended jobs go to /dev/null below.
say() { echo "local.sh: $*" >&3; }
signal_all() { # SIGNAL
  local pid
  for pid in ${pids[@]+"${pids[@]}"}; do kill -s "$1" -- "-$pid" 2>/dev/null || true; done
}
# Once one has failed the others get $grace seconds, then SIGTERM, and 10 seconds later SIGKILL.
begin_ending() { [[ -n "$deadline" ]] || deadline=$((SECONDS + grace)); }
# shellcheck disable=SC2317,SC2329 # The traps call it.
forward() { # SIGNAL
  say "passing SIG$1 on to all processes."
  signal_all "$1"
  begin_ending
}
trap 'forward INT' INT
trap 'forward TERM' TERM
trap 'signal_all KILL' EXIT

for ((i = 0; i < count; i++)); do
  compose "$i" "$@"
  set -m # A process group of its own, so that the terminal's Ctrl-C reaches it through `forward`.
  "${line[@]}" </dev/null \
    > >(trap '' INT TERM; exec awk -v i="$i" '{ print "[" i "] " $0; fflush() }') 2>&1 &
  set +m
  pids[i]=$!
done
while ((${#pids[@]})); do
  for i in "${!pids[@]}"; do
    kill -0 "${pids[i]}" 2>/dev/null && continue
    code=0
    wait "${pids[i]}" 2>/dev/null || code=$?
    unset "pids[i]"
    ((code)) || continue
    say "process $i ended with exit code $code."
    if [[ -z "$first" || (-z "$killing" && "$first" =~ ^(75|134)$) ]]; then first="$code"; fi
    begin_ending
  done
  if [[ -n "$deadline" ]] && ((SECONDS >= deadline)); then
    [[ -n "$killing" ]] || say "ending the processes that are left."
    signal_all "${killing:-TERM}"
    killing=KILL deadline=$((SECONDS + 10))
  fi
  { sleep 0.2 || true; } 2>/dev/null # A signal to this script's group may end it.
done
exit "${first:-0}"
