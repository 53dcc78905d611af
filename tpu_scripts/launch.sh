#!/usr/bin/env bash
# Starts the run on every worker, or continues it if the bucket has it already. Refuses what preflight refuses.
#
#   tpu_scripts/launch.sh SETTINGS [--dry-run]
#
# The run does not need this machine any more: status.sh, logs.sh, watch.sh and stop.sh find it again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
start "$@"

tpu preflight
if "$dry_run"; then
    run gcloud storage ls "$run_dir/run/config.json"
    say "with --resume, if that is there:"
elif gcloud storage ls "$run_dir/run/config.json" >/dev/null 2>&1; then
    words+=(--resume)
fi
on_workers "setsid nohup bash hypersteer/code/tpu_scripts/on_worker/train.sh $BUCKET $NAME $PORT \
$(quote "${words[@]}") >/dev/null 2>&1 </dev/null &"
"$dry_run" || say "started; follow it with tpu_scripts/logs.sh, keep it alive with tpu_scripts/watch.sh"
