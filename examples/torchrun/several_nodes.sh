#!/usr/bin/env bash
# Start the ranks of one node; run it on every node of a run, with the same PROGRAM and flags.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node1 examples/torchrun/several_nodes.sh PROGRAM [flags]
#
# PROGRAM is pretrain_et.py, -m tools.NAME or -m alignment NAME. From the environment:
#   NNODES, NODE_RANK     how many nodes there are, and which of them this is, from 0
#   MASTER_ADDR           name or address of node 0
#   MASTER_PORT           29500; on one machine each run needs its own
#   NPROC_PER_NODE        ranks of a node: the GPUs that Slurm or nvidia-smi shows, or 1
#   MAX_RESTARTS          how often all ranks start again, from the newest checkpoint: 3, and 0
#                         for what is started by -m
#   SAVE_SECONDS          270: how long ranks may save after SIGTERM before they are killed
#   INTERFACE             network interface of NCCL and gloo, such as ib0; they choose otherwise
#   NODE_ADDR             this node's own address, where its host name does not resolve
#   LOG_DIR               the output of every rank is kept there, by node and rank
#   PYTHON                the interpreter: that of .venv, or python3
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if (($# == 0)); then
    echo "several_nodes.sh: name the program, such as pretrain_et.py, and its flags" >&2
    exit 2
fi
for name in NNODES NODE_RANK MASTER_ADDR; do
    if [[ -z ${!name:-} ]]; then
        echo "several_nodes.sh: set $name in the environment (see the top of this file)" >&2
        exit 2
    fi
done

gpus() {
    if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then
        echo "$SLURM_GPUS_ON_NODE"
    else
        { nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU' || true
    fi
}

python=${PYTHON:-}
if [[ -z $python ]]; then
    [[ -x .venv/bin/python ]] && python=.venv/bin/python || python=python3
fi
[[ $1 == -m ]] && restarts=0 || restarts=3
ranks=${NPROC_PER_NODE:-$(gpus)}
((ranks > 0)) || ranks=1

# Tensor and context parallelism overlap with computing only if kernels start in order.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
if [[ -n ${INTERFACE:-} ]]; then
    export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE
fi

options=(
    --nnodes "$NNODES" --nproc-per-node "$ranks"
    --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}"
    --rdzv-id "${SLURM_JOB_ID:-run}" --rdzv-conf "is_host=$((NODE_RANK == 0))"
    --max-restarts "${MAX_RESTARTS:-$restarts}" --shutdown-timeout "${SAVE_SECONDS:-270}"
)
[[ -z ${NODE_ADDR:-} ]] || options+=(--local-addr "$NODE_ADDR")
[[ -z ${LOG_DIR:-} ]] || options+=(--log-dir "$LOG_DIR/node$NODE_RANK" --tee 3)

# Slurm sends a warning to every process of a node. The ranks save and end by themselves, so
# torchrun must outlive it.
trap '' USR1
exec "$python" -m torch.distributed.run "${options[@]}" "$@"
