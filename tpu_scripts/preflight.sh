#!/usr/bin/env bash
# Looks for what would make a run fail or hang, on every worker, and says which worker; exit code 2 if it finds any.
#
#   tpu_scripts/preflight.sh SETTINGS [--dry-run]
#
# On each worker: the bucket can be written and read, the base LM and packages are there, disk room, no other run, no
# process on the chips, no stale lock, process 0 can be reached. Over all: the same code and packages everywhere.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
start "$@"

if "$dry_run"; then
    on_worker "preflight.sh $run_dir $PORT $FREE_GB $workers"
    exit
fi
code=0
found="$(on_worker "preflight.sh $run_dir $PORT $FREE_GB $workers")" || code=$?
problems="$(grep '^problem ' <<<"$found" | sort || true)"
versions="$(sed -n 's/^versions //p' <<<"$found" | sort)"  # HOST and the rest
answered="$(grep -c . <<<"$versions" || true)"
kinds="$(cut -d ' ' -f 2- <<<"$versions" | sort -u)"
if ((code != 0 || answered != workers)); then
    say "only $answered of $workers workers answered (ssh ended with $code; was setup.sh run?): $(cut -d ' ' -f 1 \
        <<<"$versions" | xargs)"
elif (($(wc -l <<<"$kinds") > 1)); then
    say "versions differ; run tpu_scripts/setup.sh again:"
    echo "$versions"
elif [[ -z "$problems" ]]; then
    say "$workers workers are ready: $kinds"
    exit
fi
[[ -z "$problems" ]] || echo "$problems"
say "refused"
exit 2
