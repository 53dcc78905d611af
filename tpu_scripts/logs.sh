#!/usr/bin/env bash
# Follows the log of worker 0, where the trainer prints; the others' are in BUCKET/NAME/logs, a minute behind.
#
#   tpu_scripts/logs.sh SETTINGS [--dry-run]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
start "$@"

run gcloud compute tpus queued-resources ssh "$NAME" --project="$PROJECT" --zone="$ZONE" \
    --node=0 --worker=0 --command="tail -n 100 -F hypersteer/log"
