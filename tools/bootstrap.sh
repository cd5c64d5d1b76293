#!/usr/bin/env bash
# Create the virtual environment .venv with all packages of the project. If it is up to date, return
# immediately.
#
#   tools/bootstrap.sh                   create or update the environment
#   tools/bootstrap.sh PACKAGE==X ...    also install these packages, without their dependencies
#   tools/bootstrap.sh --oldest ...      create or update .venv-oldest, with the lowest versions that
#                                        setup.py allows
#   tools/bootstrap.sh --find            only print the Python that would be used
#
# PYTHON=/path/to/python selects the interpreter. The exit code is 2 if there is no usable Python or
# if the packages cannot be installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=.venv
if [[ ${1:-} == --oldest ]]; then
    venv=.venv-oldest
    shift
fi
python=$venv/bin/python

fail() {
    echo "bootstrap: $*" >&2
    exit 2
}

# usable PYTHON: return 0 if the interpreter runs, is of version 3.12 or newer, and has venv and
# pip. It must be run to know this: a name on PATH may be a pyenv shim without a Python version,
# and Debian's python3 may lack venv and pip.
usable() {
    "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))' \
        </dev/null >/dev/null 2>&1
}

candidates() {
    local name
    for name in python3.12 python3.13 python3.14 python3 python; do
        type -P "$name" || true
    done
    ls -d "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.*/bin/python 2>/dev/null | sort -V || true
    ls -d "${HOME:-}"/{miniforge3,miniconda3,anaconda3}{,/envs/*}/bin/python 2>/dev/null || true
    uv python find '>=3.12' 2>/dev/null || true
}

find_python() {
    if [[ -n ${PYTHON:-} ]]; then
        usable "$PYTHON" || fail "PYTHON=$PYTHON is not a Python of version 3.12 or newer with venv and pip."
        echo "$PYTHON"
        return
    fi
    local candidate
    while read -r candidate; do
        if usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done < <(candidates)
    fail "no Python of version 3.12 or newer with venv and pip was found. Install one" \
        "(for example: apt install python3.12-venv, pyenv install 3.12, or uv python install 3.12)" \
        "or name one with PYTHON=/path/to/python3.12."
}

# ensure STAMP KEY PIP-ARGUMENTS...: run the installer unless the file STAMP contains KEY. The file is written
# after the installation has succeeded.
ensure() {
    local stamp=$venv/$1 key=$2
    shift 2
    [[ -f $stamp && $(<"$stamp") == "$key" ]] && return
    rm -f "$stamp"
    echo "bootstrap: installing into $venv (the first time takes a few minutes) ..."
    "${installer[@]}" "$@" ||
        fail "pip could not install the packages (its message is above);" \
            "check the network and the free disk space, then run the same command again."
    echo "$key" >"$stamp.new"
    mv "$stamp.new" "$stamp"
}

if [[ ${1:-} == --find ]]; then
    find_python
    exit
fi

if ! usable "$python" || ! "$python" -m pip --version >/dev/null 2>&1; then
    base=$(find_python)
    echo "bootstrap: creating $venv with $base"
    "$base" -m venv --clear "$venv" || fail "$base could not create $venv. Check the free disk space and the permissions of $PWD."
fi

# The folder is part of the key, so that an environment that was moved is installed again.
installer=("$python" -m pip install --disable-pip-version-check)
if [[ $venv == .venv ]]; then
    ensure .installed "$(cat setup.py pyproject.toml constraints.txt | cksum) $PWD" -c constraints.txt -e '.[dev]'
else
    ensure .uv uv uv  # pip has no option that prefers the lowest versions
    installer=("$python" -m uv pip install --python "$python")
    ensure .installed "$(cat setup.py pyproject.toml | cksum) $PWD" --resolution lowest-direct -e '.[dev]'
fi
if (($#)); then
    ensure .extra-packages "$*" --no-deps "$@"
fi
