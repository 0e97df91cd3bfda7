#!/usr/bin/env bash
# Creates a Cloud TPU pod slice, installs spap on all of its workers, runs one command there and fetches the result, or
# keeps a run going over as many slices as it takes.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: tpu_scripts/pod.sh COMMAND --name NAME --zone ZONE [OPTIONS] [-- WORDS]

Commands, in the order of a run (docs/tpu.md explains them):
  create    ask for the slice through a queued resource     --type TYPE [--runtime VERSION] [--spot]
  wait      return when the slice is ready, or fail if it never will be
  install   install spap with JAX for TPUs on all workers   --source WHEEL_OR_GIT_URL
  run       start a run on all workers; it goes on if the connection is lost
                                         [--env NAME=VALUE] -- prune MODEL --output DIR ...
  logs      follow worker 0's output until the run ends; its exit code is the script's
  fetch     copy a folder from worker 0 to this machine     --from DIR --to DIR
  delete    delete the slice and everything on it
  keep      all of this except fetch, again with a new slice whenever one is taken away, until the run has ended
                            --type TYPE [--runtime VERSION] [--spot] --source WHEEL_OR_GIT_URL
                                         [--env NAME=VALUE] -- prune MODEL --output gs://BUCKET/DIR ...

Options:
  --name NAME        name of the slice and of its queued resource
  --zone ZONE        zone, for example us-west4-a
  --project PROJECT  Google Cloud project (default: gcloud's own setting)
  --type TYPE        type of the slice, for example v5litepod-16, v5p-64, v6e-8
  --runtime VERSION  version of the workers' software (default: the usual one for the type)
  --spot             use spot capacity, which is cheaper and may be taken away at any time
  --env NAME=VALUE   a variable of the command's environment; may be repeated
  --before TIME      install no package that was published later; keep says which time goes on with a run
  --dry-run          print the commands without running them
TEXT
}

fail() {
  echo "pod.sh: $1" >&2
  exit 2
}

# Runs a command, or prints it with shell quoting in a dry run.
call() {
  if [[ $dry_run == yes ]]; then
    printf '%q ' "$@" && echo
  else
    "$@"
  fi
}

gcloud_tpus() { # GROUP VERB WORDS...
  call gcloud compute tpus "$1" "$2" "${@:3}" --zone "$zone" ${project:+--project "$project"}
}

on_workers() { # WHICH COMMAND
  gcloud_tpus tpu-vm ssh "$name" --worker "$1" --command "$2"
}

usual_runtime() {
  case $1 in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

slice_state() {
  gcloud_tpus queued-resources describe "$name" --format 'value(state.state)'
}

create() {
  [[ -n $type ]] || fail "create needs --type, for example v5litepod-16."
  gcloud_tpus queued-resources create "$name" --node-id "$name" --accelerator-type "$type" \
    --runtime-version "${runtime:-$(usual_runtime "$type")}" ${spot:+--spot}
}

wait_for_slice() {
  local state
  while true; do
    state=$(slice_state) || return
    [[ $dry_run == no ]] || { echo "$state" && return; }
    echo "$name: $state" >&2
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING) fail "the slice is $state: delete it and create it again." ;;
    esac
    sleep 30
  done
}

install() {
  [[ -n $origin ]] || fail "install needs --source, a wheel's path or git+https://..."
  local package=$origin
  if [[ $origin == *.whl ]]; then
    package=./$(basename "$origin")
    gcloud_tpus tpu-vm scp "$origin" "$name:" --worker all
  fi
  # The workers' own Python is older than spap needs, so uv brings one.
  on_workers all "curl -LsSf https://astral.sh/uv/install.sh | sh && export PATH=~/.local/bin:\$PATH && \
uv venv --quiet --allow-existing --python 3.12 ~/spap && uv pip install --quiet --python ~/spap/bin/python \
${before:+--exclude-newer $before }'jax[tpu]' gcsfs $(printf '%q' "$package")"
}

run() {
  [[ ${#words[@]} -gt 0 ]] || fail "run needs the words of a spap command after --, for example -- prune MODEL ..."
  local command
  # shellcheck disable=SC2088  # the tilde is expanded on the worker
  command="${variables:+env$variables }~/spap/bin/spap$(printf ' %q' "${words[@]}")"
  # The processes of the slice find each other. The exit code is stored for the logs and keep commands.
  on_workers all "rm -f ~/spap.code; nohup bash -c $(printf '%q' "$command --coordinator auto; echo \$? > ~/spap.code") \
> ~/spap.log 2>&1 < /dev/null &"
}

logs() {
  # After the watched process has ended, tail reads the rest of the file once more.
  on_workers 0 "until test -e ~/spap.code; do sleep 2; done & tail -n +1 -F --pid \$! ~/spap.log; exit \$(cat ~/spap.code)"
}

fetch() {
  [[ -n $from && -n $to ]] || fail "fetch needs --from and --to."
  gcloud_tpus tpu-vm scp --recurse "$name:$from" "$to" --worker 0
}

delete() {
  gcloud_tpus queued-resources delete "$name" --force --quiet
}

# Deletes the slice, if it is still there.
remove() {
  delete || [[ $(slice_state 2>&1) == *NOT_FOUND* ]]
}

# Succeeds if the slice is gone or about to go. An unclear answer counts as no.
is_gone() {
  local state
  state=$(slice_state 2>&1) || [[ $state == *NOT_FOUND* ]] || return 1
  [[ $state =~ NOT_FOUND|FAILED|SUSPEND ]]
}

# Prints the exit code of a worker that ended with an error of its own, for which worker 0 ended too; fails without one.
error_of_another() {
  { on_workers all 'cat ~/spap.code' || true; } | grep -x -m 1 -E '[1-9]|[1-6][0-9]|7[0-4]'
}

new_slice() {
  create && wait_for_slice && install && run
}

keep() {
  local code restarts=0
  [[ ${#words[@]} -gt 0 ]] || fail "keep needs the words of a spap command after --, for example -- prune MODEL ..."
  [[ " ${words[*]}" =~ " --output"[\ =]"gs://" ]] || fail "keep needs --output gs://..., where finished blocks outlive a slice."
  [[ -n $origin ]] || fail "keep needs --source, a wheel's path or git+https://..."
  before=${before:-$(date -u +%FT%TZ)} # a run continues with the same versions only, so later slices install no newer ones
  echo "if this script is stopped, delete $name; the same command with --before $before then goes on" >&2
  (new_slice) || fail "no run has begun: see above, delete $name if it is there, and try again."
  while true; do
    logs || true # ends with the run or with the connection; the exit code does not distinguish them
    code=$(on_workers 0 'cat ~/spap.code') || code=''
    if [[ $dry_run == yes ]]; then
      echo "$code" && delete && return
    elif [[ -n $code && $code -ge 75 ]]; then # 75: stopped by SIGTERM; above 128: killed
      code=$(error_of_another || echo "$code")
    fi
    if [[ -n $code && $code -lt 75 ]]; then
      until remove; do sleep 30; done
      return "$code"
    fi
    sleep 30 # wait until the state of the slice is up to date
    if is_gone; then
      echo "$name was taken away; requesting another one" >&2
      restarts=0
      until (remove && new_slice); do sleep 30; done
    elif [[ -n $code ]]; then
      [[ $((restarts += 1)) -le 5 ]] || fail "the run ended with code $code six times, and $name is still there: see its logs, and delete it."
      run || true # a failure means that the slice is going away, which the next iteration detects
    fi
  done
}

name='' zone='' project='' type='' runtime='' spot='' origin='' variables='' before='' from='' to='' dry_run=no words=()
[[ $# -gt 0 ]] || { usage >&2 && exit 2; }
command=$1 && shift
[[ $command != --help && $command != -h ]] || { usage && exit 0; }
while [[ $# -gt 0 ]]; do
  case $1 in
    --spot) spot=yes && shift && continue ;;
    --dry-run) dry_run=yes && shift && continue ;;
    --) shift && words=("$@") && break ;;
    --help | -h) usage && exit 0 ;;
  esac
  [[ $# -gt 1 ]] || fail "$1 needs a value, or is not an option; --help lists all."
  case $1 in
    --name) name=$2 ;;
    --zone) zone=$2 ;;
    --project) project=$2 ;;
    --type) type=$2 ;;
    --runtime) runtime=$2 ;;
    --source) origin=$2 ;;
    --env) variables+=" $(printf %q "$2")" ;;
    --before) before=$2 ;;
    --from) from=$2 ;;
    --to) to=$2 ;;
    *) fail "$1 is not an option; --help lists all." ;;
  esac
  shift 2
done
[[ -n $name && -n $zone ]] || fail "--name and --zone are needed."
[[ $dry_run == yes ]] || command -v gcloud > /dev/null || fail "gcloud is not installed: see cloud.google.com/sdk."

case $command in
  create | install | run | logs | fetch | delete | keep) "$command" ;;
  wait) wait_for_slice ;;
  *) fail "$command is not a command; --help lists all." ;;
esac
