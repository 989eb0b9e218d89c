#!/usr/bin/env bash
# Table 3 of LaMamba-Diff (Fu et al., arXiv 2408.02615): LaMamba-S, and the same without attention, with windows
# that never move, and with attention over all tokens. Other settings as in table2_lamamba.sh.
# DATA: ImageNet's training images, or their cached latents (and IMAGES_OF the images).
OBJECTIVE=${OBJECTIVE:-diffusion}
source "$(dirname "$0")/common.sh"
recipe imagenet256 256 400000 50000 --global-batch-size 256 --lr 1e-4
system LaMamba LaMamba-S LaMamba-N
system without-attention LaMamba-S-none LaMamba-N-none
system without-shifts LaMamba-S-unshifted LaMamba-N-unshifted
system global-attention LaMamba-S-global LaMamba-N-global
run_table
