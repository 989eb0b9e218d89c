#!/usr/bin/env bash
# Table 3: CelebA-HQ at 64 x 64, with the settings of Table 6. The patch is not stated; 4 makes 256 tokens.
# DATA: the 30,000 images, of any size.
source "$(dirname "$0")/common.sh"
recipe celeba-hq 64 400000 50000 --vae none --global-batch-size 64 --lr 5e-4
all_systems DiT-S/4
