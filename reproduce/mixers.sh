#!/usr/bin/env bash
# Mixers at equal settings: the loss of DiT-N/4 on CIFAR-10's held-out images after 1,200 steps, one run per mixer and seed.
#
#     bash reproduce/mixers.sh DATA [SEED ...]      DATA holds CIFAR-10 as torchvision unpacks it, or train/ and test/
#     OBJECTIVE=flow bash reproduce/mixers.sh DATA [SEED ...]
#
# Runs go to results/mixers/<objective>/<mixer>-<seed>/; those that are there already are left out. About 8 minutes each on
# one core. python -m reproduce.mixers_table adds what they measured to reproduce/results/mixers.json.
set -euo pipefail
data=$(realpath "$1")
shift
cd "$(dirname "$0")/.."
objective=${OBJECTIVE:-diffusion}
train=$data val=$data
if [ -d "$data/test" ]; then train=$data/train val=$data/test; fi

run() {
    name=$1
    shift
    for seed in $seeds; do
        folder=results/mixers/$objective/$name-$seed
        if compgen -G "$folder/*/checkpoints/0001200.pt" > /dev/null; then continue; fi
        rm -rf "$folder"
        "${PYTHON:-python}" train.py --model DiT-N/4 --vae none --image-size 32 --num-classes 10 --data-path "$train" \
            --val-path "$val" --global-batch-size 64 --max-steps 1200 --lr 1e-3 --num-workers 0 --ckpt-every 300 \
            --global-seed "$seed" --objective "$objective" --results-dir "$folder" "$@"
    done
}

for seeds in ${*:-0 1 2}; do
    run attention --mixer attention
    run pdessm --mixer pdessm --pde-coupling diagonal
    run gate --mixer pdessm --pde-gate
    run conditioned --mixer pdessm --pde-conditioned
    run gate-conditioned --mixer pdessm --pde-gate --pde-conditioned
    run pairwise --mixer pdessm --pde-coupling pairwise
    run coupled --mixer pdessm --pde-coupling coupled
    run pdessm-g --mixer pdessm-g
done
"${PYTHON:-python}" -m reproduce.mixers_table
