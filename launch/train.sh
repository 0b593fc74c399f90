#!/usr/bin/env bash
# Train an experiment on all GPUs of this machine, or go on with it where it stopped.
#
#   bash launch/train.sh configs/full/gsm_coconut.yaml [--set KEY=VALUE ...]
#   NUM_GPUS=1 DS_CONFIG=ds_configs/zero2_offload_fp16.json bash launch/train.sh CONFIG
#
# Ctrl-C, kill or kill -USR1 of this script: all ranks save and stop, exit code 75; twice Ctrl-C: at once, unsaved.
# `touch RUN/SAVE` saves now, `touch RUN/STOP` saves and stops; RUN is save_path/name.

source "$(dirname "$0")/ranks.sh"

if [ $# = 0 ]; then
    sed -n '2,8s/^# \?//p' "$0"
    exit 2
fi
gpus=$(which_gpus)
run_ranks $gpus -- train "$@"
