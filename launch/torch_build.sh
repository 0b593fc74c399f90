#!/usr/bin/env bash
# Which build of torch fits the GPUs of this machine; for setup.sh, which sources this file.
#
#   compute capability   driver          build
#   5.0 to 7.2           525 and newer   CUDA 12.6, from PyTorch's own index  (GTX 9xx and 10xx, V100)
#   7.5 to 9.0           525 to 579      the same                             (RTX 20xx to 40xx, A100, H100)
#   7.5 and newer        580 and newer   the default one, CUDA 13
#
# CUDA 12.6 code runs on every driver from 525 on (CUDA's minor-version compatibility), CUDA 13 needs 580.  The default
# build has no code for GPUs older than 7.5, the CUDA 12.6 build none for GPUs newer than 9.0.

TORCH_INDEX=https://download.pytorch.org/whl
PATH=$PATH:/usr/lib/wsl/lib # where WSL has nvidia-smi
PCI_DEVICES=${PCI_DEVICES:-/sys/bus/pci/devices}

# "7.5, 550.54.14", one line per GPU; nothing without a GPU.  Fails with a remedy where nvidia-smi cannot tell.
list_gpus() {
    local listed
    if ! command -v nvidia-smi >/dev/null; then
        if grep -qs 0x10de "$PCI_DEVICES"/*/vendor; then
            echo "setup: this machine has an NVIDIA device and no driver (nvidia-smi is missing);" \
                "install driver 580 or newer for its GPU, or start the container with --gpus all" >&2
        fi
        return 0
    fi
    listed=$(nvidia-smi --query-gpu=compute_cap,driver_version --format=csv,noheader 2>&1) || true
    if grep -E '^[0-9]+\.[0-9]+, *[0-9]+' <<<"$listed"; then return; fi
    case $listed in
        '' | *"No devices were found"*) ;;
        *)
            if [ -n "${TORCH_BUILD:-}" ]; then echo "$listed" && return; fi
            setup_fail "nvidia-smi does not say which GPUs there are: ${listed%%$'\n'*}" \
                "after an update of the driver, reboot; update a driver older than 525 (to 580 or newer)" \
                "to choose yourself: TORCH_BUILD=cu126 (GTX 9xx to H100) or default (RTX 20xx and newer) bash launch/setup.sh" \
                "to train on the CPU: DS_ACCELERATOR=cpu bash launch/setup.sh"
            ;;
    esac
}

# torch_build GPUS: "default" or "cu126" for the lines of list_gpus; fails with a remedy where no build fits.
torch_build() {
    local capability driver oldest=999 newest=0 oldest_driver=9999
    while IFS=', ' read -r capability driver; do
        [ -n "$capability" ] || continue
        capability=$((${capability%.*} * 10 + ${capability#*.}))
        driver=${driver%%.*}
        if [ "$capability" -lt "$oldest" ]; then oldest=$capability; fi
        if [ "$capability" -gt "$newest" ]; then newest=$capability; fi
        if [ "$driver" -lt "$oldest_driver" ]; then oldest_driver=$driver; fi
    done <<<"$1"
    if [ "$newest" = 0 ]; then
        echo default
    elif [ "$oldest" -lt 50 ]; then
        setup_fail "a GPU has compute capability ${oldest:0:1}.${oldest:1}, and torch needs 5.0" \
            "hide it (CUDA_VISIBLE_DEVICES=...) and name the build of the others: TORCH_BUILD=cu126 bash launch/setup.sh" \
            "to train on the CPU: DS_ACCELERATOR=cpu bash launch/setup.sh"
    elif [ "$oldest_driver" -lt 525 ]; then
        setup_fail "the NVIDIA driver is version $oldest_driver, and torch needs 525 or newer" \
            "install a newer driver (580 if all GPUs are RTX 20xx or newer), reboot, and run setup again"
    elif [ "$oldest" -ge 75 ] && [ "$oldest_driver" -ge 580 ]; then
        echo default
    elif [ "$newest" -le 90 ]; then
        echo cu126
    elif [ "$oldest" -ge 75 ]; then
        setup_fail "the NVIDIA driver is version $oldest_driver, and a GPU of this machine needs 580 or newer" \
            "install driver 580, reboot, and run setup again"
    else
        setup_fail "no single torch build has code for both the oldest and the newest GPU of this machine" \
            "name the GPUs to use in CUDA_VISIBLE_DEVICES, set TORCH_BUILD=default (RTX 20xx and newer) or" \
            "TORCH_BUILD=cu126 (GTX 9xx to H100), and run setup again"
    fi
}

# torch_requirement BUILD: pip's arguments.
torch_requirement() {
    local pin
    pin=$(grep '^torch==' requirements.txt)
    case $1 in
        default) echo "$pin" ;;
        cu126 | cpu) echo "$pin+$1 --index-url $TORCH_INDEX/$1" ;;
        *) setup_fail "TORCH_BUILD=$1 is unknown; write default, cu126 or cpu" ;;
    esac
}

# check_torch GPUS BUILD: stop where GPUs are listed and torch cannot use them.
check_torch() {
    local problem
    [ -n "$1" ] || return 0
    problem=$(.venv/bin/python - <<'PYTHON'
import torch

from coconut_ds.cli.doctor import runs_on

cuda, built = torch.cuda, f"torch {torch.__version__}"
if not cuda.is_available():
    print(f"{built} sees none")
for number in range(cuda.device_count()):
    if not runs_on(cuda.get_device_capability(number), cuda.get_arch_list()):
        print(f"{built} has no code for {cuda.get_device_name(number)}")
PYTHON
    )
    [ -z "$problem" ] ||
        setup_fail "nvidia-smi lists GPUs, but $problem" \
            "installed build: $2. Is the driver new enough (nvidia-smi shows it), and CUDA_VISIBLE_DEVICES not empty?" \
            "To choose another build: rm .venv/torch.sha256, then TORCH_BUILD=cu126 (or default) bash launch/setup.sh" \
            "To train on the CPU: DS_ACCELERATOR=cpu bash launch/setup.sh"
}
