#!/usr/bin/env bash
# Stops the run on every worker, with a checkpoint, and clears what it may have left: processes, a stale lock.
#
#   tpu_scripts/stop.sh SETTINGS [--dry-run]
#
# The TPU stays, and costs; launch.sh continues the run, delete.sh gives the TPU back.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
start "$@"

on_worker "stop.sh $GRACE stopped"
