#!/usr/bin/env bash
# From a bare machine to a model that reasons in latent space, in minutes, without a GPU, hub or account.
#
#   bash launch/quickstart.sh            SEED=1 bash launch/quickstart.sh
#
# Makes chains of sums and products and a tiny GPT-2, trains it with Coconut, with the paper's loss and as two controls,
# and prints one table.  PLAIN=0 leaves the paper's loss out, the longest of the four.
# To resume after an interruption, run the same command.  Further arguments (--set KEY=VALUE) go to every training.

source "$(dirname "$0")/setup.sh"

seed=${SEED:-0}
ds_config=ds_configs/zero2_offload.json
runs=()

# Two ranks: two GPUs where there are two, one GPU with twice the micro-batches, else two processes on the CPU.
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
ranks=2 micro_batches=1
if [ "$gpus" = 1 ]; then ranks=1 micro_batches=2; fi
export WANDB_MODE=${WANDB_MODE:-disabled} HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
export PYTHONWARNINGS=ignore::FutureWarning

train() { # train CONFIG ARGUMENT...: one run under DeepSpeed
    local port name
    name=quickstart-$(basename "$1" .yaml | tr _ -)-seed$seed
    port=$(python -c 'from coconut_ds.engine.watchdog import free_port; print(free_port())')
    deepspeed --num_gpus $ranks --master_port "$port" --log_level error --module coconut_ds train "$1" \
        --deepspeed_config $ds_config \
        --set "name=$name" --set "seed=$seed" --set gradient_accumulation_steps=$micro_batches "${@:2}"
    runs+=("runs/$name")
}

echo "== 1/6  chains of sums and products modulo 7, and a tiny GPT-2 with random weights"
python preprocessing/arithmetic.py --seed "$seed" --model-dir data/arithmetic_gpt2

echo "== 2/6  Coconut: the steps of the reasoning become latents, stage by stage"
train configs/quickstart/coconut.yaml "$@"
if [ "${PLAIN:-1}" = 1 ]; then
    echo "== 3/6  Coconut with the paper's loss: the latents learn from the text alone"
    train configs/quickstart/plain.yaml "$@"
fi

echo "== 4/6  no thoughts: the steps are hidden, and nothing takes their place"
train configs/quickstart/no_thoughts.yaml "$@"

echo "== 5/6  no CoT: the same model, with neither steps nor latents"
train configs/quickstart/no_cot.yaml "$@"

echo "== 6/6  result (its last lines say what was learned, by stage, and which control learned it too)"
python -m coconut_ds report "${runs[@]}"
