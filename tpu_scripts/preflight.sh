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
grep '^problem ' <<<"$found" | sort || true
reached="$(grep -c '^versions ' <<<"$found" || true)"
((code == 0 && reached == workers)) || say "$reached of $workers workers answered (ssh's exit code $code); heard from:" \
    "$(awk '/^versions / { print $2 }' <<<"$found" | sort | tr '\n' ' ')"
kinds="$(sed -n 's/^versions [^ ]* //p' <<<"$found" | sort -u | wc -l)"
if ((kinds > 1)); then
    echo "problem versions differ; run tpu_scripts/setup.sh again:"
    grep '^versions ' <<<"$found" | sort
fi
if ((code != 0 || reached != workers || kinds != 1)) || grep -q '^problem ' <<<"$found"; then
    say "refused"
    exit 2
fi
say "$workers workers are ready: $(sed -n 's/^versions [^ ]* //p;q' <<<"$found")"
