#!/usr/bin/env bash
# Samples of the paper's three systems (the PDE's coupling is diagonal), trained by diffusion and by flow matching with the same
# flags for a few minutes each, on the digits and on CIFAR-10: reproduce/results/grids-digits.png and grids-cifar10.png, with
# their commands beside them.
#
#     bash reproduce/grids.sh DATA        DATA holds CIFAR-10 as torchvision unpacks it, or train/
set -euo pipefail
source "$(dirname "$0")/claim.sh"
begin "bash $0 DATA" "$@"
whole_numbers STEPS
if [ -d "$data/train" ]; then data=$data/train; fi
PYTHON=${PYTHON:-python}

draw() { # draw SET SYSTEM OBJECTIVE SAMPLER FLAGS...
    local folder=results/grids/$1-$2-$3 sampler=$4 steps set=$1
    shift 4
    if [ -f "$folder/samples.png" ]; then return; fi
    rm -rf "$folder"
    case $set in
        digits) steps=${STEPS:-1600} && set -- --image-size 8 --global-batch-size 32 --lr 3e-3 "$@" ;;
        cifar10) steps=${STEPS:-800} && set -- --image-size 32 --global-batch-size 64 --lr 1e-3 --data-path "$data" --num-workers 0 "$@" ;;
    esac
    run train.py --vae none --num-classes 10 "$@" --max-steps "$steps" --results-dir "$folder"
    run sample.py --ckpt "$(echo "$folder"/*/checkpoints/*"$steps".pt)" --sampler "$sampler" --num-sampling-steps 50 \
        --cfg-scale 2 --samples-per-class 4 --out "$folder/samples.png"
}

run() {
    "$PYTHON" "$@"
    echo "${*//"$data"/DATA}" >> "results/grids/$set.txt"
}

known_words SETS "the sets" digits cifar10
claim results/grids "$data" "${STEPS:+, STEPS=$STEPS}"
for set in ${SETS:-digits cifar10}; do
    patch=2
    if [ "$set" = cifar10 ]; then patch=4; fi
    for objective in diffusion flow; do
        sampler=heun
        if [ "$objective" = diffusion ]; then sampler=dpm-solver; fi
        draw "$set" DiT "$objective" "$sampler" --objective "$objective" --model "DiT-N/$patch"
        draw "$set" U-Net "$objective" "$sampler" --objective "$objective" --model UNet-N
        draw "$set" PDE-SSM-DiT "$objective" "$sampler" --objective "$objective" --model "DiT-N/$patch" --mixer pdessm --pde-coupling diagonal
    done
    "$PYTHON" -m reproduce.grids_sheet "$set"
    cp "results/grids/$set.txt" "reproduce/results/grids-$set.txt"
done
