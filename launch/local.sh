#!/usr/bin/env bash
# Several processes on this machine, joined by JAX as on a pod: to try a multi-host run without one.
#
#   bash launch/local.sh 2 -- train --gin_file=nano_docs.gin --gin_file=runs/backbone.gin \
#     --gin.WARMUP_STEPS=1 --gin.TRAIN_STEPS=3 --gin.BATCH_SIZE=8 --gin.EVAL_BATCHES=1 \
#     --gin.MODEL_DIR=/tmp/variator_run
#
# That trains a tiny backbone on this Python's documentation for three steps; nothing has to be
# there before. Arguments after -- are those of `variator`, and are checked before anything starts;
# each process gets its place in the run added to them.
#   --devices M     CPU devices that each process pretends to have (default 1)
#   --grace S       seconds that the others have to end by themselves after one failed (default 45)
#   --program FILE  an executable that is run in place of `variator`
#   --no-check      start without a look at the command
#   --dry-run       say what would be started, and stop
# Every line of output carries its process's index. The exit code is that of the process that failed
# first; 75 and 134, with which the others answer a loss, count only where there is no other. Ctrl-C
# and SIGTERM go to all processes; the same command then continues from the newest checkpoint.
set -euo pipefail

# shellcheck source=launch/_venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_venv.sh"
# shellcheck source=launch/_check.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_check.sh"

fail() {
  echo "error: $*" >&2
  exit 2
}

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
    *) fail "unknown argument '$1' before --: there are --devices, --grace, --program," \
      "--no-check and --dry-run." ;;
  esac
  shift
done
is_count "$devices" || fail "--devices $devices: expected a number of devices, such as 2."
is_count "$grace" || fail "--grace $grace: expected a number of seconds, such as 45."
[[ -z "$program" || -x "$program" ]] || fail "--program $program: there is no such executable."
(($# > 1)) || fail "no command given: the arguments of variator come after --."
shift # --

# XLA keeps the last of two equal flags, so the user's own stay except for this one.
export JAX_PLATFORMS=cpu PYTHONUNBUFFERED=1
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"

if [[ -n "$program" ]]; then
  run=("$program")
else
  [[ -n "$dry_run" ]] || prepare_venv train
  run=("$ROOT/.venv/bin/python" -m variator_jax)
  export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
  [[ -z "$check" ]] || check_command "${run[0]}" . "$@"
fi

free_port() {
  "$(find_python)" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0))
print(s.getsockname()[1])'
}

# The place in the run follows the command's name, for a further -- may stand in the arguments.
place() { # INDEX: sets `flags`
  flags=("--coordinator_address=127.0.0.1:$port" "--process_count=$count" "--process_index=$1")
}

if [[ -n "$dry_run" ]]; then
  port="PORT"
  echo "Would start $count processes with $devices CPU devices each, JAX_PLATFORMS=cpu:"
  for ((i = 0; i < count; i++)); do
    place "$i"
    printf '[%s]' "$i"
    printf ' %q' "${run[@]}" "$1" "${flags[@]}" "${@:2}"
    echo
  done
  exit 0
fi

port="$(free_port)"
pids=() codes=() # An empty code is that of a process that still runs.

start() { # INDEX ARGUMENT...
  local index="$1"
  place "$index"
  shift
  # A group of its own: this script, not the terminal, says what each process hears, and in time.
  set -m
  "${run[@]}" "$1" "${flags[@]}" "${@:2}" </dev/null \
    > >(trap '' INT TERM; exec awk -v i="$index" '{ print "[" i "] " $0; fflush() }') 2>&1 &
  set +m
  pids[index]=$!
  codes[index]=""
}

signal_all() { # SIGNAL
  local i
  for ((i = 0; i < count; i++)); do
    [[ -n "${codes[i]-gone}" ]] || kill -s "$1" -- "-${pids[i]}" 2>/dev/null || true
  done
}

first="" deadline="" killing=""
exec 3>&2 # Where this script speaks; bash's own notices of ended jobs are sent to nowhere below.
say() { echo "local.sh: $*" >&3; }
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

collect() { # Notes the processes that have ended; fails once none is left.
  local i code left=1
  for ((i = 0; i < count; i++)); do
    [[ -z "${codes[i]}" ]] || continue
    if kill -0 "${pids[i]}" 2>/dev/null; then
      left=0
      continue
    fi
    code=0
    wait "${pids[i]}" 2>/dev/null || code=$?
    codes[i]="$code"
    ((code)) || continue
    say "process $i ended with exit code $code."
    # 75 and 134 say that another was lost: the code of that other is the one that tells.
    if [[ -z "$first" || (-z "$killing" && "$first" =~ ^(75|134)$) ]]; then first="$code"; fi
    begin_ending
  done
  return "$left"
}

enforce() { # Ends what has outlived its time.
  [[ -n "$deadline" ]] && ((SECONDS >= deadline)) || return 0
  if [[ -z "$killing" ]]; then
    say "ending the processes that are left."
    signal_all TERM
    killing=1 deadline=$((SECONDS + 10))
  else
    signal_all KILL
  fi
}

for ((i = 0; i < count; i++)); do start "$i" "$@"; done
while collect; do
  enforce
  { sleep 0.2 || true; } 2>/dev/null # A signal to this script's group may end it.
done
exit "${first:-0}"
