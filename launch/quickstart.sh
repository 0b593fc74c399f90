#!/usr/bin/env bash
# From a bare machine to a model that reasons in latent space, in minutes, without a GPU, hub or account.
#
#   bash launch/quickstart.sh            SEED=1 bash launch/quickstart.sh
#
# Makes chains of additions and a tiny GPT-2, trains it with Coconut, trains its no-CoT twin, prints one table.
# To resume after an interruption, run the same command.  Further arguments (--set KEY=VALUE) go to both trainings.

source "$(dirname "$0")/setup.sh"

seed=${SEED:-0}
ds_config=ds_configs/zero2_offload.json
coconut=runs/quickstart-coconut-seed$seed
no_cot=runs/quickstart-no-cot-seed$seed

# Two ranks: two GPUs where there are two, one GPU with twice the micro-batches, else two processes on the CPU.
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
ranks=2 micro_batches=1
if [ "$gpus" = 1 ]; then ranks=1 micro_batches=2; fi
export WANDB_MODE=${WANDB_MODE:-disabled} HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
export PYTHONWARNINGS=ignore::FutureWarning

train() { # train CONFIG NAME ARGUMENT...: one run under DeepSpeed
    local port
    port=$(python -c 'from coconut_ds.engine.watchdog import free_port; print(free_port())')
    deepspeed --num_gpus $ranks --master_port "$port" --log_level error --module coconut_ds train "$1" \
        --deepspeed_config $ds_config \
        --set "name=$2" --set "seed=$seed" --set gradient_accumulation_steps=$micro_batches "${@:3}"
}

echo "== 1/4  chains of additions modulo 10, and a tiny GPT-2 with random weights"
python preprocessing/arithmetic.py --seed "$seed" --model-dir data/arithmetic_gpt2

echo "== 2/4  Coconut: the steps of the reasoning become latents, stage by stage"
train configs/quickstart/coconut.yaml "$(basename "$coconut")" "$@"

echo "== 3/4  no CoT: the same model, with neither steps nor latents"
train configs/quickstart/no_cot.yaml "$(basename "$no_cot")" "$@"

echo "== 4/4  result (its last lines say what was not learned, if anything was not)"
python -m coconut_ds report "$coconut" "$no_cot"
