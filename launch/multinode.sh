#!/usr/bin/env bash
# Train on several machines.  save_path must be on a file system that all of them see, under the same name; the
# repository with its .venv, the data and the model must be there under the same names too.
#
# Without ssh: the same command on every machine, NODE_RANK 0, 1, ... in the order of the hostfile.
#
#   HOSTFILE=hostfile NODE_RANK=0 MASTER_ADDR=node-a bash launch/multinode.sh configs/full/gsm_coconut.yaml
#   HOSTFILE=hostfile NODE_RANK=1 MASTER_ADDR=node-a bash launch/multinode.sh configs/full/gsm_coconut.yaml
#
# With ssh and pdsh: one command on one of the machines; DeepSpeed starts the others.
#
#   HOSTFILE=hostfile bash launch/multinode.sh configs/full/gsm_coconut.yaml
#
# A signal to one of the scripts stops all machines: ranks agree on it.  With pdsh that is the script on a machine of
# the hostfile; elsewhere `touch RUN/STOP`.  When a link breaks, all ranks end after --stuck-seconds (300), exit code
# 77, and the same commands go on from the newest checkpoint.  Several networks: NCCL_SOCKET_IFNAME=eth0 (GPUs),
# GLOO_SOCKET_IFNAME=eth0 (CPU).  Slurm: launch/slurm.sbatch.

source "$(dirname "$0")/ranks.sh"

HOSTFILE=${HOSTFILE:-launch/hostfile}
if [ $# = 0 ] || [ ! -f "$HOSTFILE" ]; then
    sed -n '2,18s/^# \?//p' "$0"
    [ -f "$HOSTFILE" ] || echo "There is no hostfile $HOSTFILE; copy launch/hostfile.example." >&2
    exit 2
fi
if [ -n "${NODE_RANK:-}" ]; then
    export MASTER_PORT=${MASTER_PORT:-29500} # the same on every machine; one that is in use is named
    run_ranks --hostfile "$HOSTFILE" --no_ssh --node_rank "$NODE_RANK" --master_addr "${MASTER_ADDR:?}" -- train "$@"
else
    run_ranks --hostfile "$HOSTFILE" --force_multi ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} -- train "$@"
fi
