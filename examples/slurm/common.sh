# shellcheck shell=bash
# Functions shared by the Slurm job scripts. The scripts source this file from the directory in
# which sbatch was called: the root of the repository or, after `pip install`, a folder with a copy
# of the installed megatron_ext/examples.
#
# Environment variables, in addition to those of examples/torchrun/several_nodes.sh:
#   CONTAINER     Container image. A file that ends in .sif runs with apptainer, any other image
#                 with the pyxis plugin and enroot. Default: no container.
#   MOUNTS        Folders to mount in the container in addition to the repository and the run
#                 directory, separated by commas. Default: none.
#   PREFLIGHT     If not empty, run tools.preflight on the nodes of the job before the first start.

cd "${SLURM_SUBMIT_DIR:?submit this file with sbatch, from the root of the repository}" || exit 2
warned=0 step='' signal=USR1
trap 'warned=1; [[ -z $step ]] || warn "$step" &' USR1

fail() {
    echo "${SLURM_JOB_NAME:-job}: $*" >&2
    exit 2
}

[[ -f examples/torchrun/several_nodes.sh ]] ||
    fail "call sbatch in the root of the repository or next to a copy of examples, not in $PWD"

# prepare RUN_DIR: create the run directory, export the address of the rendezvous and the folder of
# the logs, and record the environment of the job.
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

# on_nodes PROGRAM [flags]: run a program under torchrun on all nodes and wait for it. When Slurm
# warns this script, training receives the warning until its ranks have saved and exited; other
# programs are terminated at once. Sets `code` to the exit code.
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
    # shellcheck disable=SC2016  # SLURM_NODEID is expanded on the node
    srun --ntasks-per-node 1 --cpu-bind none --open-mode append \
        --output "$run_dir/logs/%x-%j-%N-%n.log" "${options[@]}" \
        bash -c 'NODE_RANK=$SLURM_NODEID exec "$@"' - "${command[@]}" &
    step=$!
    await
}

# await: wait until `step` ends, also when signals interrupt the wait. Sets `code` to its exit code.
await() {
    while
        code=0
        wait "$step" || code=$?
        kill -0 "$step" 2>/dev/null
    do :; done
    step=
}

# pretrain [flags]: train in the run directory. If PREFLIGHT is not empty, check the nodes first.
pretrain() {
    if [[ -n ${PREFLIGHT:-} && ${SLURM_RESTART_COUNT:-0} == 0 ]]; then
        on_nodes -m tools.preflight --run-dir "$run_dir" "$@"
        ((code == 0)) || fail "tools.preflight reported errors: read the logs in $run_dir/logs"
    fi
    on_nodes pretrain_et.py --run-dir "$run_dir" "$@"
}

# warn PID: send the signal every 10 seconds until the process has ended, because ranks that have
# not reached their first step ignore it.
warn() {
    while kill -"$signal" "$1" 2>/dev/null; do
        sleep 10
    done
}

# preempted: return 0 if Slurm has preempted the job. Slurm requeues a job that it preempts without
# GraceTime. With GraceTime the job's steps receive SIGTERM, and Slurm counts the job as completed
# when the script ends, unless the script requeues it.
preempted() {
    scontrol show --oneliner job "$SLURM_JOB_ID" | grep -q ' PreemptTime=[0-9]'
}

# finish: requeue the job if Slurm interrupted it, otherwise exit with its exit code.
finish() {
    if ((warned)) || preempted; then
        echo "Slurm interrupted the job, which is now requeued."
        # SLURM_JOB_ID of an array's last task is the id of the whole array.
        local task=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
        exec scontrol requeue "${task:-$SLURM_JOB_ID}"
    fi
    exit "$code"
}
