#!/usr/bin/env bash
# On a worker, in hypersteer/: packages into venv/, the run's files into files/. Arguments: RUN_DIR FILES.
#
# Python comes with uv, because TPU images have 3.10. Versions are those of the run's first setup, if there was one.
set -euo pipefail
cd "$HOME/hypersteer"
run_dir="$1" files="$2"

export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || python3 -m pip install --quiet --user uv
gcloud storage cp "$run_dir/requirements.txt" constraints.txt 2>/dev/null || : >constraints.txt
uv venv --quiet --clear --python 3.12 venv
uv pip install --quiet --python venv --constraints constraints.txt --editable "code[tpu]"
uv pip freeze --quiet --python venv --exclude-editable >requirements.txt
gcloud storage cp --no-clobber requirements.txt "$run_dir/requirements.txt"
if [[ "$files" != none ]]; then
    mkdir -p files
    gcloud storage rsync --recursive "$files" files
fi
echo "$(hostname): set up"
