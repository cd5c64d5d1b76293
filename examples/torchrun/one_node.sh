#!/usr/bin/env bash
# Start all ranks of a run on this machine.
#
#   NPROC_PER_NODE=8 examples/torchrun/one_node.sh pretrain_et.py --recipe FILE.yaml [flags]
#
# Reads the environment variables that several_nodes.sh lists. Default of MASTER_PORT: a free port.
set -euo pipefail
export NNODES=1 NODE_RANK=0 MASTER_ADDR=localhost MASTER_PORT="${MASTER_PORT:-0}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/several_nodes.sh" "$@"
