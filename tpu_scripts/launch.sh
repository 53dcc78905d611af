#!/usr/bin/env bash
# Starts the run on every worker, or continues it if the bucket holds a checkpoint. Refuses what preflight refuses.
#
#   tpu_scripts/launch.sh SETTINGS [--dry-run]
#
# The run does not need this machine any more: status.sh, logs.sh, watch.sh and stop.sh find it again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
start "$@"

tpu preflight
if "$dry_run"; then
    run gcloud storage ls "$run_dir/run/checkpoints/"
    say "with --resume, if that lists a checkpoint:"
elif [[ -n "$(gcloud storage ls "$run_dir/run/checkpoints/" 2>/dev/null)" ]]; then
    words+=(--resume)
fi
on_workers "setsid nohup bash hypersteer/code/tpu_scripts/on_worker/train.sh $BUCKET $NAME $PORT \
$(quote "${words[@]}") >/dev/null 2>&1 </dev/null &"
"$dry_run" || say "started; follow it with tpu_scripts/logs.sh, keep it alive with tpu_scripts/watch.sh"
