#!/usr/bin/env bash
# Runs one `variator train` command on all workers of a Cloud TPU, and again after each preemption.
#
#   bash launch/tpu_pod.sh my-pod --zone us-central2-b --type v4-32 --spot \
#     --setup 'mountpoint -q /mnt/runs || sudo mount -o X-mount.mkdir FILER:/runs /mnt/runs' -- \
#     train --gin_file=variator_xl.gin --gin.RATIO=4 --gin.MODEL_DIR=/mnt/runs/xl_4 \
#     --gin.INITIAL_CHECKPOINT_PATH=/mnt/runs/t5_1_1_xl --gin.DATA_DIR=/mnt/runs/wiki
#
# Arguments after -- are those of `variator`; where this machine has the repository's .venv, they
# are checked before anything is created. A missing TPU is created, this repository is copied to its
# workers and installed, and the command is started on each. A preempted TPU is deleted and created
# again, and the same command continues from its newest checkpoint; so MODEL_DIR must be a folder
# that all workers see: NFS, or a bucket that gcsfuse mounts (docs/multi_host.md). Only T5X writes to
# gs://...: --setup has to install it, and --engine=t5x has to be among the arguments after --.
#   --zone Z       the zone (required)
#   --type T       the accelerator type, such as v4-32 or v5litepod-16 (required)
#   --version V    the TPU software version (default tpu-ubuntu2204-base)
#   --project P    the Google Cloud project (default: gcloud's)
#   --spot         ask for a spot TPU
#   --setup C      a shell command for each worker after the installation; it may run repeatedly
#   --attempts N   how often the command is started at most (default 20)
#   --waits N      how often in a row it waits a minute for the TPU at most (default 1440)
#   --delete       delete the TPU in the end
#   --no-check     start without checking the command, as for gin files on the workers alone
#   --dry-run      print what would be done, and stop
# Needs gcloud, signed in. It starts again after exit codes 75, 134, 137, 143 and 255: a process
# or a connection was lost, or a signal ended the run.
set -euo pipefail

# shellcheck source=launch/_venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_venv.sh"
# shellcheck source=launch/_check.sh
source "$ROOT/launch/_check.sh"

say() { echo "tpu_pod.sh: $*" >&2; }

if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then
  print_help "$0"
  exit 0
fi
name="${1:-}" zone="" type="" version="tpu-ubuntu2204-base" project="" setup=""
attempts=20 waits=1440 spot="" delete="" dry_run="" check=1
[[ "$name" =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
  fail "expected the name of the TPU first (small letters, digits and -), found '$name'."
shift
while (($#)) && [[ "$1" != -- ]]; do
  case "$1" in
    --spot) spot=1 ;;
    --delete) delete=1 ;;
    --dry-run) dry_run=1 ;;
    --no-check) check="" ;;
    --zone | --type | --version | --project | --setup | --attempts | --waits)
      [[ $# -gt 1 && "$2" != --* ]] || fail "$1 needs a value."
      declare "${1#--}=$2"
      shift
      ;;
    *) fail "unknown argument '$1' before --; see --help." ;;
  esac
  shift
done
[[ -n "$zone" ]] || fail "no zone given: --zone us-central2-b, for example."
[[ -n "$type" ]] || fail "no accelerator type given: --type v4-32, for example."
[[ "$attempts" =~ ^[1-9][0-9]{0,3}$ ]] || fail "--attempts $attempts: expected a number such as 20."
[[ "$waits" =~ ^[0-9]{1,5}$ ]] || fail "--waits $waits: expected a number such as 1440."
(($# > 1)) || fail "no command given: the arguments of variator come after --."
shift # --
folder="$(model_dir "$@")" engine=builtin
! on_t5x "$@" || engine=t5x
case "$folder" in
  "" | /*) ;;
  gs://*)
    [[ "$engine" == t5x ]] || fail "MODEL_DIR is $folder, where only T5X writes: give a folder" \
      "that is mounted on all workers, such as /mnt/runs/xl_4, or --engine=t5x with T5X on them."
    ;;
  *) fail "MODEL_DIR is $folder, on each worker's own disk: give the absolute path of a folder" \
    "that is mounted on all workers, such as /mnt/runs/xl_4." ;;
esac
[[ -n "$dry_run" ]] || command -v gcloud >/dev/null ||
  fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install"

# The workers have the repository, and T5X only where --setup installs it.
python="$ROOT/.venv/bin/python"
[[ -x "$python" ]] || python="${PYTHON:-python3}"
if [[ "$check" && "$engine" == t5x ]] && ! "$python" -c 'import t5x' >/dev/null 2>&1; then
  echo "warning: the command is not checked: $python has no T5X." >&2
  check=""
fi
[[ -z "$check" ]] || check_command "$python" "$ROOT" "$1" "--engine=$engine" "${@:2}"

place=(--zone "$zone")
[[ -z "$project" ]] || place+=(--project "$project")

# Runs a command; under --dry-run, prints it.
act() {
  if [[ -n "$dry_run" ]]; then
    printf ' %q' "$@"
    echo
  else
    "$@"
  fi
}
tpu() { act gcloud compute tpus tpu-vm "$@" "${place[@]}"; }
on_workers() { tpu ssh "$name" --worker=all --command "$1"; }

# Prints the TPU's state, or MISSING; fails where gcloud does.
state() {
  local rows row
  rows="$(gcloud compute tpus tpu-vm list --format 'csv[no-heading](name.basename(),state)' \
    "${place[@]}")" || return 1
  row="$(grep "^$name," <<<"$rows")" || row="$name,MISSING"
  echo "${row#*,}"
}

create() {
  tpu create "$name" --accelerator-type "$type" --version "$version" ${spot:+--spot}
}

# What a worker runs once: its Python may be older than 3.11, and jax[tpu] brings the TPU's runtime.
INSTALL='set -e; mkdir -p variator_jax
tar -xzf variator_jax.tar.gz -C variator_jax; cd variator_jax
. launch/_venv.sh
find_python >/dev/null 2>&1 || { sudo apt-get -qq update
  sudo apt-get -qq install -y python3.11 python3.11-venv; }
prepare_venv train; .venv/bin/python -m pip install --quiet "jax[tpu]"'

install() {
  local folder done=1
  folder="$(mktemp -d)"
  act tar -czf "$folder/variator_jax.tar.gz" -C "$ROOT" --exclude '__pycache__' \
    variator_jax gin_configs launch setup.py pyproject.toml README.md LICENSE
  if tpu scp "$folder/variator_jax.tar.gz" "$name:" --worker=all && on_workers "$INSTALL" &&
    { [[ -z "$setup" ]] || on_workers "$setup"; }; then
    done=0
  fi
  rm -rf "$folder"
  return "$done"
}

# The command for each worker. One that a lost connection left running is ended first.
quoted="$(printf ' %q' "$1" --multiprocess "${@:2}")"
earlier="-f '^.venv/bin/python -m variator_jax'" # Anchored: not the shell that runs this.
RUN="pkill $earlier && sleep 10 && pkill -KILL $earlier; cd variator_jax &&
 PYTHONUNBUFFERED=1 .venv/bin/python -m variator_jax$quoted"

if [[ -n "$dry_run" ]]; then
  echo "Would create the TPU where there is no $name:"
  create
  echo "Would install variator_jax on all workers:"
  install
  echo "Would start on all workers, at most $attempts times, creating anew after a preemption:"
  on_workers "$RUN"
  exit 0
fi

# Brings the TPU up; fails where that has to wait. Deletes only a preempted TPU.
installed="" # whether variator_jax is on this TPU
ensure() {
  local current
  current="$(state)" || return 1
  case "$current" in
    READY) ;;
    MISSING)
      say "creating $name ($type, $zone)."
      installed=""
      create || return 1
      ;;
    PREEMPTED | TERMINATED)
      say "$name is $current: deleting it and creating it again."
      installed=""
      tpu delete "$name" --quiet && create || return 1
      ;;
    *)
      say "$name is $current: waiting until it is ready."
      return 1
      ;;
  esac
}

# Runs the command, after the installation, whose failure counts as a lost connection.
start() {
  if [[ -z "$installed" ]]; then
    say "installing variator_jax on all workers."
    install || return 255
    installed=1
  fi
  on_workers "$RUN"
}

# Fails for a wrong account, project or zone, which a second attempt would not change.
state >/dev/null || fail "gcloud cannot list the TPUs of $zone; its error is above."
pause="${RETRY_SECONDS:-60}" code=1 attempt=0 waited=0
while ((attempt < attempts)); do
  if ! ensure; then
    if ((++waited > waits)); then
      say "the TPU could not be used after waiting $waits times in a row (--waits)."
      break
    fi
    say "the TPU cannot be used yet: wait $waited of $waits."
    sleep "$pause"
    continue
  fi
  waited=0 attempt=$((attempt + 1)) code=0
  say "attempt $attempt of $attempts."
  start || code=$?
  ((code == 0)) && break
  current="$(state)" || current=unknown
  say "attempt $attempt ended with exit code $code, the TPU is $current."
  if [[ "$current" == READY && ! "$code" =~ ^(75|134|137|143|255)$ ]]; then
    break # An error of the command itself, which would come again.
  fi
  ((attempt == attempts)) || sleep "$pause"
done
[[ -z "$delete" ]] || tpu delete "$name" --quiet
((code == 0)) || say "giving up with exit code $code."
exit "$code"
