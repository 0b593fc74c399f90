#!/usr/bin/env bash
# Measure everything that needs no GPU and no training run, and make docs/benchmarks.md and README's results.
#
#   bash benchmarks/run_all.sh            about 25 minutes on two cores
#   bash benchmarks/run_all.sh --quick    about 4 minutes; small shapes, into runs/benchmarks-quick, docs untouched
#
# Not part of it, for their length:  python -m benchmarks.seeds (two hours), benchmarks.quantized, benchmarks.variants (an
# hour), benchmarks.gpu (a GPU).  Their committed JSON is shown all the same.

source "$(dirname "${BASH_SOURCE[0]}")/../launch/setup.sh"

export HF_HUB_OFFLINE=1 WANDB_MODE=disabled PYTHONWARNINGS=ignore
results=benchmarks/results
quick=
if [ "${1:-}" = "--quick" ]; then
    quick=1
    results=runs/benchmarks-quick
fi

# measure NAME MODULE ARGUMENT... [-- QUICK_ARGUMENT...]: one benchmark, whose JSON goes to $results/NAME.json
measure() {
    local name=$1 module=$2 long=() short=() seen=
    shift 2
    for word in "$@"; do
        if [ "$word" = "--" ]; then seen=1; elif [ $seen ]; then short+=("$word"); else long+=("$word"); fi
    done
    if [ ! $seen ]; then short=("${long[@]}"); fi
    echo "== $name"
    if [ $quick ]; then long=("${short[@]}"); fi
    python -m benchmarks.record --results "$results" "$name" "$module" "${long[@]}"
}

steps=(--variants single_pass textbook coconut_ds coconut_ds+checkpointing)
measure train_step train_step --repeats 3 -- --size gpt2-tiny --repeats 3
measure train_step_prosqa train_step --rows 4 --question 430 --answer 12 --repeats 3 "${steps[@]}" \
    -- --size gpt2-tiny --rows 4 --question 430 --answer 12 --repeats 3 "${steps[@]}"
measure scaling scaling -- --size gpt2-tiny --sizes gpt2-tiny
measure launches launches -- --models gpt2 --repeats 3
measure plan_accuracy plan_accuracy -- --rows 2 --tuning lora
measure decode decode -- --prompts 8 --new_tokens 16 --repeats 1
measure startup startup -- --repeats 1
measure stage_switch stage_switch -- --items 500
measure checkpoint checkpoint -- --size gpt2-tiny
measure engine_overhead engine_overhead -- --steps 10
if [ ! $quick ]; then
    python -m benchmarks.render
fi
