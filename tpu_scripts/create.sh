#!/usr/bin/env bash
# Asks for the TPU and waits until it is there. Costs start when it is; tpu_scripts/delete.sh ends them.
#
#   tpu_scripts/create.sh SETTINGS [--dry-run]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
start "$@"

command=(gcloud compute tpus queued-resources create "$NAME" --project="$PROJECT" --zone="$ZONE"
    --accelerator-type="$ACCELERATOR" --runtime-version="$runtime" --valid-until-duration="${QUEUE_HOURS}h")
if ((SLICES == 1)); then
    command+=(--node-id="$NAME")
else
    command+=(--node-count="$SLICES" --node-prefix="$NAME")
fi
case "$CAPACITY" in
    spot) command+=(--spot) ;;
    reserved) command+=(--reserved) ;;
    flex-start)  # not in gcloud's stable commands yet
        command=(gcloud alpha "${command[@]:1}" --provisioning-model=flex-start --max-run-duration="$MAX_RUN") ;;
esac
say "$SLICES x $ACCELERATOR ($topology, $((SLICES * chips)) chips, $workers workers), $CAPACITY, in $ZONE"
run "${command[@]}"

deadline=$((SECONDS + QUEUE_HOURS * 3600))
now=
until [[ "$now" == ACTIVE ]]; do
    before="$now"
    now="$(state)" || now=unknown  # a lost connection is no answer
    if "$dry_run"; then
        say "then, every ${POLL}s until it says ACTIVE:"
        echo "$now"
        break
    fi
    [[ "$now" == "$before" ]] || say "$NAME is $now"
    case "$now" in
        FAILED | SUSPENDING | SUSPENDED)
            run gcloud compute tpus queued-resources describe "$NAME" --project="$PROJECT" --zone="$ZONE" >&2
            fail "the request is $now, see above (quota? zone? no capacity?); tpu_scripts/delete.sh, then again" ;;
    esac
    ((SECONDS < deadline)) || fail "still $now after QUEUE_HOURS=$QUEUE_HOURS; tpu_scripts/delete.sh takes it back"
    [[ "$now" == ACTIVE ]] || sleep "$POLL"
done
