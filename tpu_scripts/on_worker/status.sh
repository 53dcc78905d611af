#!/usr/bin/env bash
# On a worker: prints "status HOST" and how the run is: running, what train.sh or stop.sh wrote, gone, or none.
set -euo pipefail
cd "$HOME/hypersteer" 2>/dev/null || { echo "status $(hostname) none" && exit; }

if [[ -f ended ]]; then how="$(cat ended)"
elif [[ ! -f pid ]]; then how=none
elif grep -qs on_worker/train.sh "/proc/$(cat pid)/cmdline"; then how=running
else how=gone  # without an exit code: the VM was started again, or somebody killed it
fi
echo "status $(hostname) $how"
