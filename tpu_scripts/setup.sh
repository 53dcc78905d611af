#!/usr/bin/env bash
# Puts code, packages and files on every worker.
#
#   tpu_scripts/setup.sh SETTINGS [--dry-run]
#
# A run has one code and one set of packages for its whole life, so that it continues exactly on another TPU: the first
# setup keeps this clone's last commit and the packages' versions in BUCKET/NAME, later ones take them from there. To
# run other code, choose another NAME.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
start "$@"

clone="$(dirname "$here")"
archive=/tmp
if ! "$dry_run"; then
    archive="$(mktemp -d)"
    trap 'rm -r "$archive"' EXIT
    [[ -z "$(git -C "$clone" status --porcelain)" ]] || say "note: what is not committed stays here"
fi
run git -C "$clone" archive --output="$archive/code.tar.gz" HEAD
run gcloud storage cp --no-clobber "$archive/code.tar.gz" "$run_dir/code.tar.gz"
run gcloud storage cp "$run_dir/code.tar.gz" "$archive/kept.tar.gz"
if ! "$dry_run"; then
    commit="$(git get-tar-commit-id < <(gunzip -c "$archive/kept.tar.gz" 2>/dev/null))"
    say "the code of $NAME is commit $commit"
    [[ "$commit" == "$(git -C "$clone" rev-parse HEAD)" ]] || say "note: that is not this clone's HEAD any more"
fi
on_workers "mkdir -p hypersteer/code && cd hypersteer && gcloud storage cp $run_dir/code.tar.gz code.tar.gz \
&& tar -xzf code.tar.gz -C code && bash code/tpu_scripts/on_worker/setup.sh $run_dir $FILES"
