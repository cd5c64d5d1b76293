#!/usr/bin/env bash
# Start the ranks of one node. Run it on every node of a run, with the same PROGRAM and flags.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node1 examples/torchrun/several_nodes.sh PROGRAM [flags]
#
# PROGRAM is pretrain_et.py, -m tools.NAME or -m alignment NAME. In a checkout the program is run in
# its root. After `pip install` the same names start the console script `et`, in the present folder.
# Environment variables:
#   NNODES, NODE_RANK     Number of nodes, and the number of this node, from 0. Required.
#   MASTER_ADDR           Host name or address of node 0. Required.
#   MASTER_PORT           Port of node 0; runs on the same machine need different ports.
#                         Default: 29500.
#   NPROC_PER_NODE        Number of ranks on the node. Default: the number of GPUs that Slurm or
#                         nvidia-smi reports, or 1 without GPUs.
#   MAX_RESTARTS          How often all ranks restart, from the newest checkpoint, after a failure.
#                         Default: 3, or 0 for a PROGRAM that starts with -m.
#   SAVE_SECONDS          Seconds that the ranks have to save after SIGTERM before they are killed.
#                         Default: 270.
#   INTERFACE             Network interface of NCCL and gloo, such as ib0. Default: their choice.
#   NODE_ADDR             Address of this node, needed if its host name does not resolve.
#   LOG_DIR               Folder for the output of every rank, by node and rank. Default: none.
#   PYTHON                Python interpreter. Default: that of .venv if it exists, else python3.
set -euo pipefail
root=$(dirname "${BASH_SOURCE[0]}")/../..
[[ ! -f $root/pretrain_et.py ]] || cd "$root"

if (($# == 0)); then
    echo "several_nodes.sh: the program is missing: give its name, such as pretrain_et.py, and its flags" >&2
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
if [[ ! -f pretrain_et.py ]]; then  # not a checkout, which has a folder for each -m
    case $1-${2:-} in
        pretrain_et.py-*) command=(pretrain "${@:2}") ;;
        -m-tools.*) command=("${2#tools.}" "${@:3}") ;;
        -m-alignment) command=(align "${@:3}") ;;
        *)
            echo "several_nodes.sh: $1 is no program here. Give pretrain_et.py, -m tools.NAME or -m alignment NAME" >&2
            exit 2
            ;;
    esac
    et=$(dirname "$(type -P "$python" || echo "$python")")/et
    if [[ ! -x $et ]]; then
        echo "several_nodes.sh: there is no $et: install the project for $python, or set PYTHON" >&2
        exit 2
    fi
    set -- --no-python "$et" "${command[@]}"
fi
ranks=${NPROC_PER_NODE:-$(gpus)}
((ranks > 0)) || ranks=1

# Communication of tensor and context parallelism overlaps with computation only if kernels start
# in order.
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

# Slurm sends a warning to every process of a node. The ranks save and exit by themselves, so
# torchrun must ignore the signal.
trap '' USR1
exec "$python" -m torch.distributed.run "${options[@]}" "$@"
