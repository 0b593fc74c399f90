#!/usr/bin/env bash
# Measure the weights in `load_model_path` on `val_path`, on all GPUs of this machine.
#
#   bash launch/eval.sh configs/published/gsm_coconut_eval.yaml [--set load_model_path=CHECKPOINT]
#   NUM_GPUS=1 DS_CONFIG=ds_configs/zero2.json bash launch/eval.sh CONFIG

source "$(dirname "$0")/ranks.sh"

if [ $# = 0 ]; then
    sed -n '2,5s/^# \?//p' "$0"
    exit 2
fi
gpus=$(which_gpus)
run_ranks $gpus -- eval "$@"
