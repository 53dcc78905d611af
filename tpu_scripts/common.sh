# Sourced by every script: command line, settings, and the one place through which commands go.
# shellcheck shell=bash disable=SC2034  # some of its variables are for the scripts

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
tool="$(basename "$0" .sh)"
dry_run=false

say() { if "$dry_run"; then echo "# $*"; else echo "$tool: $*"; fi; }

fail() {
    echo "$tool: $*" >&2
    exit 1
}

# Reads the command line of a script, SETTINGS [--dry-run], and checks every setting.
start() {
    settings=
    local word
    for word in "$@"; do
        case "$word" in
            --help | -h) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" && exit 0 ;;
            --dry-run) dry_run=true ;;
            -*) fail "$word is not an option; see $0 --help" ;;
            *) [[ -z "$settings" ]] || fail "one settings file, please, not $settings and $word"; settings="$word" ;;
        esac
    done
    [[ -n "$settings" ]] || fail "which settings? cp tpu_scripts/settings.sh my_run.sh, fill it in, $0 my_run.sh"
    [[ -f "$settings" ]] || fail "no such settings file: $settings; make it from tpu_scripts/settings.sh"
    [[ "$settings" == */* ]] || settings="./$settings"
    local known given
    known="$(names_in "$here/settings.sh")"
    given="$(names_in "$settings")"
    for word in $given; do
        grep -qx "$word" <<<"$known" || fail "$settings sets $word, which is not a setting; these are: $(xargs <<<"$known")"
    done
    for word in $known; do
        grep -qx "$word" <<<"$given" || fail "$settings does not set $word; copy its line from tpu_scripts/settings.sh"
    done
    # shellcheck source=tpu_scripts/settings.sh
    source "$settings"
    check_settings
}

names_in() { sed -n 's/^\([A-Za-z0-9_]*\)=.*/\1/p' "$1"; }

# Each setting against what is possible; also sets `topology`, `chips`, `runtime`, `gke` (of one slice),
# `workers` (of all), `run_dir` and `words`, the trainer's command line.
check_settings() {
    local row
    match NAME '^[a-z][a-z0-9-]{0,39}$' 'small letters, digits and dashes, at most 40, a letter first'
    match BUCKET '^(gs:/)?/[^ ]*[^ /]$' 'gs://BUCKET or gs://BUCKET/FOLDER, without a slash at its end'
    match FILES '^(none|(gs:/)?/[^ ]*[^ /])$' 'a gs:// folder, without a slash at its end, or none'
    match PROJECT '^[a-z][a-z0-9.:-]+$' 'a project id; yours: gcloud config get-value project'
    match ZONE '^[a-z]+-[a-z]+[0-9]+-[a-z]$' 'a zone; all: gcloud compute tpus locations list'
    match ACCELERATOR '^[a-z0-9-]+$' 'a first column of tpu_scripts/topologies.txt'
    row="$(awk -v name="$ACCELERATOR" '$1 == name' "$here/topologies.txt")"
    [[ -n "$row" ]] || fail "ACCELERATOR is $ACCELERATOR, which is not in tpu_scripts/topologies.txt; these are:" \
        "$(awk '!/^#/ { print $1 }' "$here/topologies.txt" | xargs)"
    read -r _ topology chips workers runtime gke <<<"$row"
    match SLICES '^[1-9][0-9]*$' 'a number from 1'
    match CAPACITY '^(spot|on-demand|reserved|flex-start)$' 'spot, on-demand, reserved or flex-start'
    if [[ "$CAPACITY" == flex-start ]]; then
        match MAX_RUN '^[1-9][0-9]*[hd]$' 'hours or days such as 12h or 7d, because CAPACITY is flex-start'
    else
        match MAX_RUN '^none$' "none, because CAPACITY is $CAPACITY; only flex-start has an end"
    fi
    match PORT '^[1-9][0-9]{3,4}$' 'a port; 8476 unless something else listens there'
    match POLL '^[0-9.]+$' 'a number of seconds'
    local name
    for name in QUEUE_HOURS FREE_GB MAX_RESTARTS GRACE; do
        match "$name" '^[0-9]+$' 'a whole number'
    done
    match IMAGE '^[^ ]+$' 'a container image, or none'
    [[ -n "${TRAIN[*]-}" ]] || fail "TRAIN is empty; give the words after \`hypersteer train\`, such as (gemma2-2b)"
    for name in "${TRAIN[@]}"; do
        case "$name" in
            --out* | --resume | --multihost | --mesh.slices*)
                fail "TRAIN has $name, which launch sets by itself from NAME, BUCKET and SLICES; leave it out" ;;
        esac
    done
    workers=$((workers * SLICES))
    run_dir="$BUCKET/$NAME"
    words=(train "${TRAIN[@]}" --multihost --out "$run_dir/run")
    ((SLICES == 1)) || words+=(--mesh.slices "$SLICES")
}

match() { [[ "${!1}" =~ $2 ]] || fail "$1 is '${!1}' in $settings, and must be $3"; }

# A command as it can be pasted into a shell.
quote() {
    local word flag line=
    for word in "$@"; do
        if [[ ! "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
            flag="$(sed -n '1s/^\(--[a-z-]*=\).*/\1/p' <<<"$word")"
            # shellcheck disable=SC2001  # ${word//...} means something else in the bash 3 of a Mac
            word="$flag'$(sed "s/'/'\\\\''/g" <<<"${word#"$flag"}")'"
        fi
        line="$line$word "
    done
    echo "${line% }"
}

# Runs a command, or prints it in a dry run.
run() {
    if "$dry_run"; then quote "$@"; else "$@"; fi
}

# Runs another of these scripts with the same settings.
tpu() {
    local script="$here/$1.sh"
    shift
    if "$dry_run"; then set -- "$@" --dry-run; fi
    "$script" "$settings" "$@"
}

# Runs a command on every worker of every slice, all at once.
on_workers() {
    run gcloud compute tpus queued-resources ssh "$NAME" --project="$PROJECT" --zone="$ZONE" \
        --node=all --worker=all --batch-size=all --command="$1"
}

# A script of on_worker/, where setup has put it.
on_worker() { on_workers "bash hypersteer/code/tpu_scripts/on_worker/$*"; }

# State of the request: WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, SUSPENDING, SUSPENDED, FAILED, ...
state() {
    run gcloud compute tpus queued-resources describe "$NAME" --project="$PROJECT" --zone="$ZONE" \
        --format="value(state.state)"
}
