#!/bin/sh
# What overlay.py does with real checkouts of DiT, SiT and fast-DiT, on a CPU and without a hub: overlay.sh DIT SIT FAST_DIT
# The output is in results/overlay.txt. Weights are random: what counts is that all runs, and that the checkouts stay clean.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
dit=$(cd "$1" && pwd) sit=$(cd "$2" && pwd) fast=$(cd "$3" && pwd)
python=${PYTHON:-python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HOME="$work/hub" HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore

PYTHONPATH="$here" $python - <<'EOF'
import argparse
from pathlib import Path

import torch
from diffusers.models import AutoencoderKL
from models import DiT_models

torch.manual_seed(0)
blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
vae = AutoencoderKL(**blocks, block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4)
cached = Path("hub/hub/models--stabilityai--sd-vae-ft-mse")
vae.save_pretrained(cached / "snapshots" / ("0" * 40))
(cached / "refs").mkdir()
(cached / "refs" / "main").write_text("0" * 40)

for mixer in ("attention", "pdessm", "pdessm-g"):
    for child, learn_sigma in (("DiT", True), ("SiT", False)):
        model = DiT_models["DiT-S/8"](mixer=mixer, learn_sigma=learn_sigma)
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
        args = argparse.Namespace(model=f"{child}-S/8", image_size=256, num_classes=1000, vae="ema")
        torch.save(dict(ema=model.state_dict(), args=args), f"{child}-{mixer}.pt")
EOF

run() {
    echo "\$ $*" | sed "s|$python|python|; s|$here/||; s|$dit|DiT|; s|$sit|SiT|; s|$fast|fast-DiT|"
    "$@" 2>&1 | grep -v 'Hub\|warn\|it/s' | sed "s|$dit|DiT|; s|$sit|SiT|; s|$fast|fast-DiT|"
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
