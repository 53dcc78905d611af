#!/usr/bin/env bash
# Prints the state of the TPU and of the run on each worker: running, exit CODE, stopped, gone (no exit code), none.
#
#   tpu_scripts/status.sh SETTINGS [--dry-run]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
start "$@"

state
on_worker status.sh
