# What a run on a TPU pod needs to know. Copy this file, fill it in, and give it to every script:
#
#   cp tpu_scripts/settings.sh my_run.sh
#   tpu_scripts/create.sh my_run.sh --dry-run
#
# Every line must stay; the scripts name what is missing, unknown or impossible before they do anything.
# shellcheck shell=bash disable=SC2034  # read by the scripts

# -- the run ----------------------------------------------------------------------------------------------------------

NAME=     # of the TPU, of the run and of its folder in the bucket: small letters, digits, dashes; at most 40
TRAIN=()  # the words after `hypersteer train`: recipe and options, such as (gemma2-2b --lm files/gemma-2-2b-it)
BUCKET=   # gs://BUCKET or gs://BUCKET/FOLDER, best in the region of ZONE; everything is kept in BUCKET/NAME
FILES=    # gs:// folder that becomes files/ on every worker (base LM, data), or "none"

# -- the TPU ----------------------------------------------------------------------------------------------------------

PROJECT=      # Google Cloud project that pays
ZONE=         # where you have quota, such as us-west4-a; all: gcloud compute tpus locations list
ACCELERATOR=  # a first column of tpu_scripts/topologies.txt, such as v5litepod-16
SLICES=1      # so many TPUs of this type, joined by the data-centre network
CAPACITY=     # spot, on-demand, reserved or flex-start; tpu_scripts/README.md says how they differ
MAX_RUN=none  # for flex-start: the TPU is taken away after this time, at most 7d; "none" for the others
QUEUE_HOURS=24  # give the request up after so many hours in the queue

# -- safety -----------------------------------------------------------------------------------------------------------

PORT=8476        # where process 0 coordinates the others; jax's own default, 8482, is shut in v6e's default firewall
FREE_GB=40       # preflight wants this much room on every worker: base LM, packages, compiled programs
MAX_RESTARTS=20  # watch gives up after so many preemptions
POLL=30          # seconds between two looks at the TPU
GRACE=30         # seconds that stop waits for a checkpoint; on GKE the pods' grace period

# -- GKE only (jobset.sh) ---------------------------------------------------------------------------------------------

IMAGE=none  # container image with hypersteer_jax[tpu] installed
