#!/usr/bin/env bash
# Train a judge that thinks in both stages and measure it, on the GPUs of this machine.
#
#   examples/alignment/torchrun/reasoning_judge.sh MODEL SIZE DATA RUNS [flags of train-judge]
#
#   MODEL   a Hugging Face folder
#   SIZE    its layout: a file of examples/alignment/judges/sizes without .yaml
#   DATA    a folder with train.jsonl, validation.jsonl and test.jsonl, and verdicts of gold:
#           train.gold.jsonl and so on
#   RUNS    folder for distilled/ (stage 1), reinforced/ (stage 2), verdicts.jsonl and agreement/
#
# FORM in the environment is a recipe of the judge format for training and measuring, such as
# examples/alignment/judges/rubric.yaml or pairwise.yaml.
# Repeat the command to resume; a finished stage ends at once.
set -euo pipefail
examples=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
[[ ! -f $examples/../pretrain_et.py ]] || cd "$examples/.."
if (($# < 4)); then
    echo "reasoning_judge.sh: give MODEL SIZE DATA RUNS (see the top of this file)" >&2
    exit 2
fi
judges=$examples/alignment/judges
model=$1 size=$judges/sizes/$2.yaml data=$3 runs=$4
shift 4
form=()
[[ -z ${FORM:-} ]] || form=(--recipe "$FORM")
for file in "$size" "$data"/{train,validation,test}{,.gold}.jsonl; do
    if [[ ! -f $file ]]; then
        echo "reasoning_judge.sh: there is no $file (see the top of this file)" >&2
        exit 2
    fi
done

train() {
    local recipe=$1 from=$2 run=$3
    shift 3
    bash "$examples/torchrun/one_node.sh" -m alignment train-judge \
        --recipe "$judges/$recipe.yaml" --recipe "$size" "${form[@]}" \
        --model "$from" --run-dir "$run" \
        --input "$data/train.jsonl" --gold "$data/train.gold.jsonl" \
        --validation-input "$data/validation.jsonl" \
        --validation-gold "$data/validation.gold.jsonl" "$@"
}

train reasoning "$model" "$runs/distilled" "$@"
train rl "$runs/distilled/best" "$runs/reinforced" "$@"
bash "$examples/torchrun/one_node.sh" -m alignment judge --recipe "$size" \
    --model "$runs/reinforced/best" --thinking asked --seq-length 8192 "${form[@]}" \
    --input "$data/test.jsonl" --output "$runs/verdicts.jsonl" --overwrite
NPROC_PER_NODE=1 bash "$examples/torchrun/one_node.sh" -m alignment agreement \
    "$data/test.gold.jsonl" "$runs/verdicts.jsonl" --items "$data/test.jsonl" \
    --output "$runs/agreement"
