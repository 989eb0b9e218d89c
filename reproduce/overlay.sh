#!/bin/sh
# What overlay.py does with real checkouts of DiT, SiT and fast-DiT, on a CPU and without a hub: overlay.sh DIT SIT FAST_DIT
# The output is in results/overlay.txt. Weights are random: this checks that everything runs and that the checkouts stay clean.
set -eu
if [ $# -ne 3 ]; then
    echo "usage: sh $0 DIT SIT FAST_DIT" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")/.." && pwd)
dit=$(cd "$1" && pwd) sit=$(cd "$2" && pwd) fast=$(cd "$3" && pwd)
python=${PYTHON:-python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HOME="$work/hub" HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore

PYTHONPATH="$here" $python -m reproduce.overlay_checkpoints "$work"

run() {
    echo "\$ $*" | sed "s|$python|python|; s|$here/||; s|$dit|DiT|; s|$sit|SiT|; s|$fast|fast-DiT|"
    status=0
    "$@" > output.txt 2>&1 || status=$?
    grep -v 'Hub\|warn\|it/s' output.txt | sed "s|$dit|DiT|; s|$sit|SiT|; s|$fast|fast-DiT|"
    return $status
}

$python -c 'import torch, timm, diffusers; print("PyTorch", torch.__version__, "timm", timm.__version__, "diffusers", diffusers.__version__)'
for checkout in "$dit" "$sit" "$fast"; do
    echo "$(basename "$checkout") $(git -C "$checkout" rev-parse --short HEAD)"
done
run $python "$here/overlay.py" --check "$dit"
run $python "$here/overlay.py" --diff "$dit" --model DiT-XL/2
run $python "$here/overlay.py" --diff "$sit"
run $python "$here/overlay.py" --check "$fast"
for mixer in attention pdessm pdessm-g; do
    run $python "$here/overlay.py" "$dit/sample.py" --model DiT-S/8 --num-sampling-steps 4 --ckpt "DiT-$mixer.pt"
    sha256sum sample.png
    run $python "$here/overlay.py" "$sit/sample.py" ODE --model SiT-S/8 --num-sampling-steps 4 --sampling-method euler --ckpt "SiT-$mixer.pt"
    sha256sum sample.png
done
run $python "$here/overlay.py" "$fast/sample.py" --model DiT-S/8 --num-sampling-steps 4 --ckpt DiT-pdessm.pt
sha256sum sample.png
for checkout in "$dit" "$sit" "$fast"; do
    echo "$(basename "$checkout"): $(git -C "$checkout" status --porcelain --ignored | wc -l) files changed, new or ignored"
done
