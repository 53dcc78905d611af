#!/usr/bin/env bash
# On a worker: prints "problem HOST ..." for whatever would make the run fail, and "versions HOST ..." to be compared.
# Arguments: RUN_DIR PORT FREE_GB WORKERS.
set -euo pipefail
cd "$HOME/hypersteer"
run_dir="$1" port="$2" free_gb="$3" workers="$4"
host="$(hostname)"
lock="${TMPDIR:-/tmp}/libtpu_lockfile"
shopt -s nullglob
chips=(/dev/vfio/[0-9]* /dev/accel*)

problem() { echo "problem $host $*"; }

# The bucket: written, read back, deleted.
echo "$host" >probe
probe="$run_dir/preflight-$host"
if ! gcloud storage cp probe "$probe" 2>errors || [[ "$(gcloud storage cat "$probe" 2>>errors)" != "$host" ]] \
    || ! gcloud storage rm "$probe" 2>>errors; then
    problem "cannot write $run_dir: $(tail -n 1 errors); give the TPU's service account roles/storage.objectAdmin"
fi

# Room, another run, other processes on the chips, and the lock that a killed process leaves behind.
free="$(df -Pk . | awk 'NR == 2 { print int($4 / 1024 / 1024) }')"
((free >= free_gb)) || problem "has ${free} GB free in $HOME, FREE_GB is $free_gb; delete something or attach a disk"
if [[ "$(bash code/tpu_scripts/on_worker/status.sh)" == *" running" ]]; then
    problem "runs already (process $(cat pid)); tpu_scripts/stop.sh"
else
    holders="$(sudo fuser "${chips[@]}" 2>/dev/null | xargs || true)"
    if [[ -n "$holders" ]]; then
        problem "has processes on its chips: $holders; look with ps, then sudo kill -9 $holders"
    elif [[ -e "$lock" ]]; then
        problem "has a stale lock of a process that is gone; tpu_scripts/stop.sh, or sudo rm $lock"
    fi
fi

# Process 0 listens, the others call it.
python3 code/tpu_scripts/on_worker/port.py "$port" "$workers" | sed "s/^/problem $host /"

if [[ -x venv/bin/python ]]; then
    sums="code:$(sha256sum code.tar.gz | cut -c -8) packages:$(sha256sum requirements.txt | cut -c -8)"
    main="$(grep -Ei '^(jax|jaxlib|libtpu|flax|optax|orbax-checkpoint|grain)==' requirements.txt | xargs)"
    echo "versions $host $(venv/bin/python --version) $main $sums"
else
    problem "has no packages; tpu_scripts/setup.sh"
    echo "versions $host none"
fi
