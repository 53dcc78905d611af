#!/usr/bin/env bash
# On a worker: stops the run, if it is running, and removes a stale lock. Arguments: GRACE WORD; WORD is its status then.
set -euo pipefail
cd "$HOME/hypersteer"
grace="$1" word="$2"
lock="${TMPDIR:-/tmp}/libtpu_lockfile"
running() { [[ "$(bash code/tpu_scripts/on_worker/status.sh)" == *" running" ]]; }

if running; then
    process="$(cat pid)"
    kill -TERM "$process"
    deadline=$((SECONDS + grace))
    while running && ((SECONDS < deadline)); do sleep 0.2; done
    kill -KILL -- "-$process" 2>/dev/null || true  # the whole group: train.sh is its leader
    echo "$(hostname): stopped$([[ -f ended ]] && sed 's/^/, /' ended)"
    echo "$word" >ended
fi
shopt -s nullglob
chips=(/dev/vfio/[0-9]* /dev/accel*)
if [[ -e "$lock" ]] && ! sudo fuser "${chips[@]}" >/dev/null 2>&1; then
    sudo rm -f "$lock"
    echo "$(hostname): removed the stale lock $lock"
fi
