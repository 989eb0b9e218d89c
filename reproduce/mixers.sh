#!/usr/bin/env bash
# Mixers at equal settings: the loss of DiT-N/4 on CIFAR-10's held-out images after 1,200 steps, one run per mixer and seed.
#
#     bash reproduce/mixers.sh DATA [SEED ...]      DATA holds CIFAR-10 as torchvision unpacks it, or train/ and test/
#
# Runs go to results/mixers/<mixer>-<seed>/; those that are there already are left out. About 6 minutes each on one core.
set -euo pipefail
data=$(realpath "$1")
shift
cd "$(dirname "$0")/.."
train=$data val=$data
if [ -d "$data/test" ]; then train=$data/train val=$data/test; fi

run() {
    name=$1
    shift
    for seed in $seeds; do
        folder=results/mixers/$name-$seed
        if compgen -G "$folder/*/checkpoints/0001200.pt" > /dev/null; then continue; fi
        rm -rf "$folder"
        "${PYTHON:-python}" train.py --model DiT-N/4 --vae none --image-size 32 --num-classes 10 --data-path "$train" \
            --val-path "$val" --global-batch-size 64 --max-steps 1200 --lr 1e-3 --num-workers 0 --ckpt-every 300 \
            --global-seed "$seed" --results-dir "$folder" "$@"
    done
}

for seeds in ${*:-0 1 2}; do
    run attention --mixer attention
    run pdessm --mixer pdessm
    run gate --mixer pdessm --pde-gate
    run conditioned --mixer pdessm --pde-conditioned
    run gate-conditioned --mixer pdessm --pde-gate --pde-conditioned
    run pairwise --mixer pdessm --pde-coupling pairwise
    run coupled --mixer pdessm --pde-coupling coupled
    run pdessm-g --mixer pdessm-g
done
"${PYTHON:-python}" - <<'PYTHON'
import json
from pathlib import Path
from statistics import mean

losses = {}
for log in sorted(Path("results/mixers").glob("*/*/log.jsonl")):
    rows = [row for row in map(json.loads, log.read_text().splitlines()) if "held_out_mse" in row and row["step"] == 1200]
    if rows:
        losses.setdefault(log.parent.parent.name.rsplit("-", 1)[0], []).append(rows[0]["held_out_mse"])
for name, values in sorted(losses.items(), key=lambda item: mean(item[1])):
    print(f"{name:20} held-out mse {mean(values):.5f}   seeds: {', '.join(f'{value:.5f}' for value in values)}")
PYTHON
