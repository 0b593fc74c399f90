#!/usr/bin/env bash
# Start ranks under the deepspeed launcher so that a signal to this script reaches them; for train.sh, eval.sh and
# multinode.sh, which source it and call
#
#   run_ranks LAUNCHER_ARGUMENT... -- COMMAND CONFIG [ARGUMENT...]
#
# Why not `deepspeed` alone: a SIGTERM ends it and leaves the ranks running, a SIGUSR1 ends its helper and it says 0,
# and what the helper hands on kills a rank that takes more than 30 seconds to save.

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# SAVE_SECONDS: how long ranks may go on when their launcher is gone, to save what they have.
SAVE_SECONDS=${SAVE_SECONDS:-600}

# The launcher's arguments: NUM_GPUS ranks, else one per GPU, or two on the CPU where there is none.  DeepSpeed ignores
# CUDA_VISIBLE_DEVICES beside --num_gpus, and takes GPUs by their number.
which_gpus() {
    local gpus
    if [ "${DS_ACCELERATOR:-}" != cpu ] && [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        gpus=$(cut -d , -f "1-${NUM_GPUS:-}" <<<"$CUDA_VISIBLE_DEVICES")
        [[ $gpus =~ ^[0-9]+(,[0-9]+)*$ ]] ||
            setup_fail "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: write the numbers of the GPUs, as in 0,1"
        echo "--include localhost:$gpus"
        return
    fi
    gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ') || true # and not the parts of one, under MIG
    if [ "${DS_ACCELERATOR:-}" = cpu ] || [ "$gpus" = 0 ]; then gpus=2; fi
    echo "--num_gpus ${NUM_GPUS:-$gpus}"
}

# Beside a GPU each rank gets cores of its own, near their memory (CPU Adam gains most).  DeepSpeed's launcher does that
# with numactl and counts all cores of the machine, so a container with fewer is left alone.
can_bind_cores() {
    [ "${DS_ACCELERATOR:-}" != cpu ] && [ "${BIND_CORES:-1}" = 1 ] && [ -z "${KMP_AFFINITY:-}" ] &&
        [ "$(nproc)" = "$(nproc --all)" ] && numactl -C 0 -m 0 true 2>/dev/null
}

# Every rank leaves a file named like its process id in this folder (coconut_ds/distributed.py).
living_ranks() {
    local id
    for id in $(ls "$COCONUT_PID_FOLDER"); do
        if kill -0 "$id" 2>/dev/null; then echo "$id"; fi
    done
}

hand_on() { # hand_on SIGNAL: to the ranks; before there are any, there is nothing to save
    local ranks
    ranks=$(living_ranks)
    if [ -n "$ranks" ]; then
        echo "$0: SIG$1 handed on to ranks" $ranks >&2
        kill -s "$1" $ranks 2>/dev/null || true
    else
        kill -TERM -- "-$launcher" 2>/dev/null || true
    fi
}

wait_for_launcher() {
    code=0
    while kill -0 "$launcher" 2>/dev/null; do # a signal interrupts `wait`, which then has to begin again
        code=0
        wait "$launcher" || code=$?
    done
}

# A launcher that was killed leaves its ranks; they notice, save and end.  What is left after that is killed.
wait_for_ranks() {
    local deadline=$((SECONDS + SAVE_SECONDS))
    if [ -n "$(living_ranks)" ]; then
        if [ "$code" = 0 ]; then code=75; fi
        while [ -n "$(living_ranks)" ] && [ $SECONDS -lt $deadline ]; do sleep 0.2; done
    fi
    kill -KILL -- "-$launcher" 2>/dev/null || true
}

run_ranks() {
    COCONUT_PID_FOLDER=$(mktemp -d)
    export COCONUT_PID_FOLDER
    trap 'rm -rf "$COCONUT_PID_FOLDER"' EXIT
    local launcher_arguments=()
    while [ "$1" != -- ]; do
        launcher_arguments+=("$1")
        shift
    done
    shift
    if [[ ! " $*" =~ " --deepspeed"([_-]config)?[\ =][^\ ]+\.json ]]; then # the user's own file counts
        set -- "$@" --deepspeed_config "${DS_CONFIG:-ds_configs/zero2_offload.json}"
    fi
    if [[ " $* " != *" --verbose "* ]]; then # what the launcher says about itself; its errors still show
        launcher_arguments+=(--log_level error)
        export PYTHONWARNINGS=${PYTHONWARNINGS-ignore::FutureWarning}
    fi
    if can_bind_cores; then launcher_arguments+=(--bind_cores_to_rank); fi
    if [[ " ${launcher_arguments[*]} " == *" --include "* ]]; then
        unset CUDA_VISIBLE_DEVICES # DeepSpeed would print that it ignores it
    fi
    set -m # the launcher and its ranks become a process group of their own
    deepspeed --master_port "${MASTER_PORT:-$(python -c 'from coconut_ds.engine.watchdog import free_port; print(free_port())')}" "${launcher_arguments[@]}" \
        --module coconut_ds "$@" </dev/null &
    launcher=$!
    set +m
    trap 'hand_on TERM' TERM HUP
    trap 'hand_on INT' INT
    trap 'hand_on USR1' USR1
    wait_for_launcher
    wait_for_ranks
    case $code in
        0) echo "$0: finished" ;;
        75) echo "$0: stopped on request; run the same command to resume" ;;
        *) echo "$0: ended with exit code $code (see docs/reliability.md)" >&2 ;;
    esac
    return "$code"
}
