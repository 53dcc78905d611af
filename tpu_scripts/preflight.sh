#!/usr/bin/env bash
# Looks for what would make a run fail or hang, on every worker, and says on which.
#
#   tpu_scripts/preflight.sh SETTINGS [--dry-run]
#
# On each worker: the bucket can be written and read, disk room, no other run, no process on the chips, no stale lock,
# process 0 can be reached. Over all: the same code and packages everywhere. Exit code 2 if something is wrong, 1 if not
# all workers answer.
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
kinds="$(cut -d ' ' -f 2- <<<"$versions" | sort -u)"
if [[ -n "$problems" ]]; then
    echo "$problems"
    say "refused"
    exit 2
fi
if ((code != 0 || $(grep -c . <<<"$versions" || true) != workers)); then
    fail "not all of $workers workers answered (ssh ended with $code; was setup.sh run?), only" \
        "$(cut -d ' ' -f 1 <<<"$versions" | xargs)"
fi
if (($(wc -l <<<"$kinds") > 1)); then
    say "versions differ; run setup.sh again:"
    echo "$versions"
    say "refused"
    exit 2
fi
say "$workers workers are ready: $kinds"
