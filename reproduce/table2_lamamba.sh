#!/usr/bin/env bash
# Table 2 of LaMamba-Diff (Fu et al., arXiv 2408.02615): ImageNet at 256 x 256 for 400,000 steps, sampled without guidance, with
# its recipe, which is DiT's. SIZES="S B XL" runs more than the smallest.
# DATA: ImageNet's training images, or their cached latents (and IMAGES_OF the images).
OBJECTIVE=${OBJECTIVE:-diffusion}
source "$(dirname "$0")/common.sh"
recipe imagenet256 256 400000 50000 --global-batch-size 256 --lr 1e-4
known_words SIZES "the paper's sizes" S B XL
for size in ${SIZES:-S}; do
    system "LaMamba-$size" "LaMamba-$size" LaMamba-N
    system "DiT-$size" "DiT-$size/2" DiT-N/4
    system "PDE-SSM-DiT-g-$size" "DiT-$size/2" DiT-N/4 --mixer pdessm-g
done
run_table
