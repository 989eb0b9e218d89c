#!/usr/bin/env bash
# Table 10: ImageNet at 256 x 256 in latent space, DiT-S/2 for 300,000 steps with DiT's own recipe (train.py's defaults), and
# guidance of 1.5, a scale that the paper does not state. DATA: ImageNet's training images, a folder per class.
source "$(dirname "$0")/common.sh"
recipe imagenet256 256 300000 50000 --vae ema
if [ "$SCALE" = full ]; then cfg=1.5; fi
system DiT DiT-S/2 DiT-N/4
pde_system PDE-SSM-DiT DiT-S/2 DiT-N/4
run_table
