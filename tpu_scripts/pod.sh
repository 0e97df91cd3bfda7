#!/usr/bin/env bash
# Runs one spap command on all workers of a Cloud TPU slice.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: tpu_scripts/pod.sh --name NAME --zone ZONE --type TYPE --wheel FILE [OPTIONS] -- SPAP_WORDS

Creates the slice, or finds it if it exists; installs the wheel on all workers; runs `spap SPAP_WORDS` on all of them
as one run; fetches a folder. After an interruption, or when a spot slice was taken away, the same command goes on.
The slice stays, and costs money, until it is deleted: pass --delete, or use gcloud.

  --name NAME        name of the slice and of its queued resource
  --zone ZONE        zone, for example us-west4-a
  --type TYPE        type of the slice, for example v5litepod-16, v5p-64, v6e-8
  --wheel FILE       wheel of spap-jax, which `python -m build --wheel` makes in dist/
  --project PROJECT  Google Cloud project (default: gcloud's own setting)
  --runtime VERSION  software of the workers (default: the usual one for the type)
  --spot             use spot capacity, which is cheaper and may be taken away at any time
  --env NAME=VALUE   set a variable of the command's environment, for example HF_TOKEN; may be repeated
  --fetch DIR        copy DIR from worker 0 to this machine afterwards; results at gs://... need no copy
  --delete           delete the slice after a successful run

Example:
  tpu_scripts/pod.sh --name prune --zone us-west4-a --type v5litepod-16 --wheel dist/spap_jax-0.1.0-py3-none-any.whl \
    --delete -- prune gs://BUCKET/model --sparsity 0.3 --data c4 --output gs://BUCKET/pruned
TEXT
}

fail() {
  echo "pod.sh: $1" >&2
  exit 2
}

name='' zone='' type='' wheel='' project='' runtime='' spot='' variables='' folder='' delete=''
[[ $# -gt 0 ]] || { usage >&2 && exit 2; }
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    --help | -h) usage && exit 0 ;;
    --spot) spot=yes && shift && continue ;;
    --delete) delete=yes && shift && continue ;;
  esac
  [[ $# -gt 1 ]] || fail "$1 needs a value, or is not an option; --help lists all."
  case $1 in
    --name) name=$2 ;;
    --zone) zone=$2 ;;
    --type) type=$2 ;;
    --wheel) wheel=$2 ;;
    --project) project=$2 ;;
    --runtime) runtime=$2 ;;
    --env) variables+=" $(printf %q "$2")" ;;
    --fetch) folder=$2 ;;
    *) fail "$1 is not an option; --help lists all." ;;
  esac
  shift 2
done
shift || true # the two dashes
[[ -n $name && -n $zone && -n $type && -n $wheel ]] || fail "--name, --zone, --type and --wheel are needed."
[[ $# -gt 0 ]] || fail "the words of a spap command are needed after --, for example -- prune MODEL ..."
[[ -f $wheel ]] || fail "there is no wheel $wheel: python -m build --wheel makes one."
command -v gcloud > /dev/null || fail "gcloud is not installed: see cloud.google.com/sdk."
case $type in
  v5litepod-*) usual=v2-alpha-tpuv5-lite ;;
  v5p-*) usual=v2-alpha-tpuv5 ;;
  v6e-*) usual=v2-alpha-tpuv6e ;;
  *) usual=tpu-ubuntu2204-base ;;
esac

tpus() { # GROUP VERB WORDS...
  gcloud compute tpus "$@" --zone "$zone" ${project:+--project "$project"}
}

state() { # of the slice; NONE if there is none
  tpus queued-resources describe "$name" --format 'value(state.state)' 2> /dev/null || echo NONE
}

delete_slice() {
  tpus queued-resources delete "$name" --force --quiet
}

# 1. The slice.
found=$(state)
case $found in
  FAILED | SUSPEND*) delete_slice && found=NONE ;;
esac
if [[ $found == NONE ]]; then
  tpus queued-resources create "$name" --node-id "$name" --accelerator-type "$type" \
    --runtime-version "${runtime:-$usual}" ${spot:+--spot}
fi
until found=$(state) && [[ $found == ACTIVE ]]; do
  echo "$name: $found" >&2
  [[ $found != FAILED && $found != SUSPEND* ]] || fail "the slice is $found: the same command asks for another one."
  sleep 30
done

# 2. The package. The workers' own Python is older than spap needs, so uv brings one.
tpus tpu-vm scp "$wheel" "$name:" --worker all
tpus tpu-vm ssh "$name" --worker all --command "curl -LsSf https://astral.sh/uv/install.sh | sh && \
export PATH=~/.local/bin:\$PATH && uv venv --quiet --allow-existing --python 3.12 ~/spap && \
uv pip install --quiet --python ~/spap/bin/python --reinstall-package spap-jax 'jax[tpu]' gcsfs ./$(basename "$wheel")"

# 3. The run: the same command on all workers, whose processes find each other; none where an earlier one still runs.
tpus tpu-vm ssh "$name" --worker all --command \
  "flock --nonblock --verbose ~/spap.lock env$variables ~/spap/bin/spap$(printf ' %q' "$@") --process auto"

# 4. The result.
[[ -z $folder ]] || tpus tpu-vm scp --recurse "$name:$folder" . --worker 0
[[ -z $delete ]] || delete_slice
