#!/usr/bin/env bash
# Create .venv-te with Transformer Engine and this project, and print its Python. If it is up to
# date, return immediately. No GPU is needed: Transformer Engine's extension of torch is compiled
# with g++ against NVIDIA's CUDA packages, and kept in the user's cache folder.
#
# The extension is not optimized, because none of its kernels is called. Do not train with it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
version=2.20.2
venv=$PWD/.venv-te
python=$venv/bin/python
stamp=$venv/.te-$version-$(cat setup.py constraints.txt | cksum | cut -d' ' -f1)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/megatron-et/wheels

# compile WHEELS: build the wheel of transformer-engine-torch into a folder. One file that includes all
# sources takes a minute, where the sources one by one take half an hour.
compile() {
    local packages build source
    packages=$("$python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    build=$(mktemp -d)
    "${pip[@]}" download --no-deps --no-build-isolation --no-binary transformer-engine-torch \
        -d "$build" "transformer-engine-torch==$version" >&2
    tar -xzf "$build"/*.tar.gz -C "$build"
    source=$(echo "$build"/*/csrc)
    find "$source" -name '*.cpp' -exec mv {} {}.inc \;
    find "$source" -name '*.inc' -printf '#include "%P"\n' | sort >"$build/all.cpp"
    mv "$build/all.cpp" "$source"
    printf '#!/bin/sh\nexec g++ "$@" -O0\n' >"$build/g++"
    chmod +x "$build/g++"
    CUDA_HOME=$packages/nvidia/cu13 \
        CPLUS_INCLUDE_PATH=$(ls -d "$packages"/nvidia/*/include "$packages/include" | paste -sd:) \
        CXX=$build/g++ PATH=$venv/bin:$PATH NVTE_PYTORCH_FORCE_BUILD=TRUE \
        "${pip[@]}" wheel --no-deps --no-build-isolation -w "$1" "${source%/csrc}" >&2
    rm -r "$build"
}

if [[ ! -e $stamp ]]; then
    "$(bash tools/bootstrap.sh --find)" -m venv --clear "$venv"
    pip=("$python" -m pip --disable-pip-version-check -q)
    "${pip[@]}" install -c constraints.txt -e . pytest pytest-timeout pytest-xdist hypothesis \
        setuptools wheel ninja pybind11 einops ml_dtypes onnx onnxscript nvdlfw-inspect \
        'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-cuda-cccl==13.0.*' \
        'nvidia-nvvm==13.0.*' 'nvidia-cudnn-frontend>=1.29' >&2
    "${pip[@]}" install --no-deps "transformer-engine==$version" "transformer-engine-cu13==$version" >&2
    # The wheel belongs to a version of torch and of Python.
    wheels=$cache/$("$python" -c "import sys, torch; print('torch%s-cp%d%d' % (torch.__version__, *sys.version_info[:2]))")
    ls "$wheels"/transformer_engine_torch-"$version"-*.whl >/dev/null 2>&1 || compile "$wheels"
    "${pip[@]}" install --no-deps "$wheels"/transformer_engine_torch-"$version"-*.whl >&2
    touch "$stamp"
fi
echo "$python"
