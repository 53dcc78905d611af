#!/usr/bin/env bash
# Keeps a launched run going: makes the TPU again after a preemption and continues, at most MAX_RESTARTS times.
#
#   tpu_scripts/watch.sh SETTINGS [--dry-run]
#
# Exit code 0: the run is finished, or stopped by stop.sh. 1: it failed, which is not tried again; its log says why.
# The TPU stays in either case, and costs. May be stopped and started again at any time; best in tmux or on a small VM.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
start "$@"

PATIENCE=4  # looks: the workers of a TPU that is taken away fail before its state says why
restarts=0
odd=0  # looks in a row at which something was wrong
missing=false  # whether the TPU is still to be made again

# One word for what the workers say, in `now`; the whole of it in `answers`. A worker counts as preempted that saved
# itself because it was told to go (exit code 75), was restarted (gone), stopped for a restart (lost) or missed (none).
look() {
    answers="$(on_worker status.sh 2>/dev/null | sed -n 's/^status //p' || true)"
    if (($(grep -c . <<<"$answers") < workers)); then now=silent
    elif grep -q ' stopped$' <<<"$answers"; then now=stopped
    elif ! grep -qv ' exit 0$' <<<"$answers"; then now=finished
    elif ! grep -Eqv ' (running|exit 0)$' <<<"$answers"; then now=running
    elif grep -Eq ' (exit 75|gone|lost|none)$' <<<"$answers"; then now=preempted
    else now=failed
    fi
}

# Starts the run again on the TPU that is there.
relaunch() {
    on_worker "stop.sh $GRACE lost" && tpu launch
}

# Makes the TPU again and starts the run on it.
recreate() {
    missing=true
    tpu delete || true  # it may be gone
    tpu create && tpu setup && relaunch && missing=false
}

# One of the two, counted, with the reason. What preflight refuses is not tried again.
again() {
    local code=0
    ((restarts < MAX_RESTARTS)) || fail "$2, after MAX_RESTARTS=$MAX_RESTARTS restarts; giving up"
    restarts=$((restarts + 1))
    odd=0
    say "$2; restart $restarts of at most $MAX_RESTARTS"
    "$1" || code=$?
    ((code != 2)) || fail "preflight refused, see above"
    ((code == 0)) || say "that did not work (exit code $code); looking again"
}

if "$dry_run"; then
    say "every ${POLL}s:"
    tpu status
    say "if the TPU is there, but a worker ended with exit code 75 or vanished:"
    relaunch
    say "if the TPU was taken away:"
    recreate
    exit
fi

while true; do
    now="$(state)" || now=unknown
    [[ "$now" != ACTIVE ]] || look
    case "$now" in
        finished) say "finished; $run_dir/run; tpu_scripts/delete.sh ends the costs" && exit ;;
        stopped) say "stopped by stop.sh; launch.sh continues, delete.sh ends the costs" && exit ;;
        running) odd=0 ;;
        SUSPENDED) again recreate "$NAME was taken away" ;;
        FAILED) again recreate "the request for $NAME failed" ;;
        preempted | failed | silent | unknown) odd=$((odd + 1)) ;;
    esac
    if ((odd >= PATIENCE)); then
        case "$now" in
            preempted) again relaunch "the run was told to go, but $NAME stayed" ;;
            silent) again recreate "only $(grep -c . <<<"$answers") of $workers workers of $NAME answer" ;;
            unknown)
                "$missing" && again recreate "$NAME is still to be made"
                ((odd < 10 * PATIENCE)) || fail "cannot see $NAME: no connection, or deleted; the run may go on" ;;
            failed)
                echo "$answers" >&2
                fail "the run failed; tpu_scripts/logs.sh, $run_dir/logs; tpu_scripts/delete.sh ends the costs" ;;
        esac
    fi
    sleep "$POLL"
done
