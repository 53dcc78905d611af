#!/usr/bin/env bash
# On a worker, in hypersteer/: runs the trainer, passes SIGTERM on to it, and keeps its exit code in `ended`.
# Arguments: BUCKET NAME PORT, then the words after `hypersteer`.
#
# The compile cache is a local copy of BUCKET/compiled: read from a bucket directly it is slow, and often not hit.
# Every minute the log and what was newly compiled go to the bucket, since a preempted worker's disk is lost.
set -euo pipefail
cd "$HOME/hypersteer"
bucket="$1" name="$2" port="$3"
shift 3

echo "$$" >pid
rm -f ended
log="$bucket/$name/logs/$(date -u +%Y%m%dT%H%M%S)-$(hostname).log"
export JAX_COORDINATOR_PORT="$port" JAX_COMPILATION_CACHE_DIR="$PWD/compiled"

upload() {
    gcloud storage cp log "$log"
    gcloud storage rsync --recursive compiled "$bucket/compiled"
}

mkdir -p compiled
gcloud storage rsync --recursive "$bucket/compiled" compiled >/dev/null 2>&1 || true  # the first run has none
venv/bin/hypersteer "$@" >log 2>&1 </dev/null &
trainer=$!
told=true
trap 'told=true; kill -TERM "$trainer" || true' TERM
while sleep 60; do upload || true; done >/dev/null 2>&1 &
uploader=$!

while "$told"; do  # a signal ends `wait`, not the trainer
    told=false
    wait "$trainer" && code=0 || code=$?
done
kill "$uploader" 2>/dev/null || true  # gone already, if the whole VM was told to stop
echo "exit $code" >>log
upload >/dev/null 2>&1 || true
echo "exit $code" >ended
