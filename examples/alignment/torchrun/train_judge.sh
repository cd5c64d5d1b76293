#!/usr/bin/env bash
# Train a judge on the GPUs of this machine, or of several.
#
#   examples/alignment/torchrun/train_judge.sh FLAGS
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node1 examples/alignment/torchrun/train_judge.sh FLAGS
#
# The second form is run on every node, with its own NODE_RANK. FLAGS are those of et-align
# train-judge; examples/torchrun/several_nodes.sh lists what else is read from the environment.
# Repeat the command to resume a run that Ctrl-C or SIGTERM ended.
set -euo pipefail
[[ -n ${NNODES:-} ]] && start=several_nodes.sh || start=one_node.sh
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../torchrun/$start" -m alignment train-judge "$@"
