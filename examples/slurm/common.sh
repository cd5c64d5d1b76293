# shellcheck shell=bash
# What the job scripts beside this file share; they source it from the folder that sbatch was
# called in, which must be the repository's root.
#
# From the environment of sbatch, beside what examples/torchrun/several_nodes.sh lists:
#   CONTAINER     an image to run in: a file that ends in .sif with apptainer, any other with the
#                 pyxis plugin and enroot
#   MOUNTS        folders to mount in it beside the repository and the run directory, by commas
#   PREFLIGHT     1: run tools.preflight on the job's nodes before the first start

cd "${SLURM_SUBMIT_DIR:?submit this file with sbatch, from the root of the repository}" || exit 2
warned=0 step='' signal=USR1
trap 'warned=1; [[ -z $step ]] || warn "$step" &' USR1

fail() {
    echo "${SLURM_JOB_NAME:-job}: $*" >&2
    exit 2
}

[[ -f pretrain_et.py ]] || fail "call sbatch in the root of the repository, not in $PWD"

# prepare RUN_DIR: say where the ranks meet, where logs go, and write down what the job runs on.
prepare() {
    run_dir=$1
    mkdir -p "$run_dir/logs"
    if [[ -z ${MASTER_ADDR:-} ]]; then
        read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    fi
    export MASTER_ADDR
    export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
    export NNODES=$SLURM_JOB_NUM_NODES LOG_DIR=$run_dir/logs/ranks
    local attempt=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
    record >"$run_dir/logs/environment-$attempt.txt" 2>&1 &
}

record() {
    date
    git describe --always --dirty --abbrev=40 || true
    echo "container: ${CONTAINER:-none}"
    [[ -n ${CONTAINER:-} ]] || "${PYTHON:-.venv/bin/python}" -m pip freeze || true
    nvidia-smi || true
    scontrol show job "$SLURM_JOB_ID" || true
}

# on_nodes PROGRAM [flags]: run it on all nodes under torchrun and wait. A warning that Slurm sends
# to this script is passed on to the ranks until they have saved and ended; a tool is ended at once.
# Sets `code`.
on_nodes() {
    case $* in
        pretrain_et.py* | "-m alignment train-"*) signal=USR1 ;;
        *) signal=TERM ;;
    esac
    local command=(bash examples/torchrun/several_nodes.sh "$@") options=()
    local folder extra=${MOUNTS:-} mounts=
    for folder in "$PWD" "$(realpath "$run_dir")" ${extra//,/ }; do
        mounts+=${mounts:+,}$folder:$folder
    done
    case ${CONTAINER:-} in
        '') ;;
        *.sif) command=(apptainer exec --nv --bind "$mounts" "$CONTAINER" "${command[@]}") ;;
        *)
            options=(--container-image "$CONTAINER" --container-mounts "$mounts")
            options+=(--container-workdir "$PWD")
            ;;
    esac
    # shellcheck disable=SC2016  # the node says which it is
    srun --ntasks-per-node 1 --cpu-bind none --open-mode append \
        --output "$run_dir/logs/%x-%j-%N-%n.log" "${options[@]}" \
        bash -c 'NODE_RANK=$SLURM_NODEID exec "$@"' - "${command[@]}" &
    step=$!
    await
}

# await: wait for `step`, whatever signals come meanwhile. Sets `code`.
await() {
    while
        code=0
        wait "$step" || code=$?
        kill -0 "$step" 2>/dev/null
    do :; done
    step=
}

# pretrain [flags]: train in the run directory, after a check of the nodes if that is wanted.
pretrain() {
    if [[ -n ${PREFLIGHT:-} && ${SLURM_RESTART_COUNT:-0} == 0 ]]; then
        on_nodes -m tools.preflight --run-dir "$run_dir" "$@"
        ((code == 0)) || fail "tools.preflight found what to fix: see $run_dir/logs"
    fi
    on_nodes pretrain_et.py --run-dir "$run_dir" "$@"
}

# Ranks that have not come to their first step do not hear a warning yet.
warn() {
    while kill -"$signal" "$1" 2>/dev/null; do
        sleep 10
    done
}

# Slurm requeues a job that it preempts without GraceTime. With it, the job's steps get SIGTERM,
# and a script that then ends is complete, unless it requeues itself.
preempted() {
    scontrol show --oneliner job "$SLURM_JOB_ID" | grep -q ' PreemptTime=[0-9]'
}

# finish: put the job back into the queue where Slurm cut it short, else end with its exit code.
finish() {
    if ((warned)) || preempted; then
        echo "cut short by Slurm: back into the queue"
        # The bare id of an array's last task would mean the whole array.
        local task=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
        exec scontrol requeue "${task:-$SLURM_JOB_ID}"
    fi
    exit "$code"
}
