#!/usr/bin/env bash
# Gives the TPU back, or takes the request for it back. The bucket is not touched.
#
#   tpu_scripts/delete.sh SETTINGS [--dry-run]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
start "$@"

run gcloud compute tpus queued-resources delete "$NAME" --project="$PROJECT" --zone="$ZONE" --force --quiet
