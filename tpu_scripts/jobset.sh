#!/usr/bin/env bash
# Starts the run on GKE, from jobset.yaml: instead of create, setup, launch and watch, for those on Kubernetes.
#
#   tpu_scripts/jobset.sh SETTINGS [--dry-run]
#
# The cluster is kubectl's current one. A dry run prints the manifest. Status: kubectl get jobset; end: kubectl delete
# jobset NAME.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
start "$@"

[[ "$IMAGE" != none ]] || fail "IMAGE is none in $settings; give a container image with hypersteer_jax[tpu] in it"
arguments=
for word in "${words[@]}"; do
    [[ "$word" != *[\"\\\|\&]* ]] || fail "TRAIN has $word, and \", \\, | or & do not survive the way into YAML"
    arguments="$arguments, \"$word\""
done
spot='/@SPOT@/d'
[[ "$CAPACITY" != spot ]] || spot='s| *# @SPOT@||'
pods=$((workers / SLICES))
manifest="$(sed -e "s|@NAME@|$NAME|" -e "s|@MAX_RESTARTS@|$MAX_RESTARTS|" -e "s|@SLICES@|$SLICES|" -e "s|@PODS@|$pods|" \
    -e "s|@GRACE@|$GRACE|" -e "s|@GKE@|$gke|" -e "s|@TOPOLOGY@|$topology|" -e "$spot" -e "s|@IMAGE@|$IMAGE|" \
    -e "s|@RUN_DIR@|$run_dir|" -e "s|@ARGUMENTS@|[${arguments#, }]|" -e "s|@PORT@|$PORT|" \
    -e "s|@CHIPS@|$((chips / pods))|" "$here/jobset.yaml")"
if "$dry_run"; then
    say "kubectl apply --filename=- with:"
    echo "$manifest"
else
    kubectl apply --filename=- <<<"$manifest"
fi
