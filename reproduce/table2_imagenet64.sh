#!/usr/bin/env bash
# Table 2: ImageNet 64 x 64 without classes, with the settings of Table 6. The patch is not stated; 4 makes 256 tokens.
# DATA: the downsampled batches that ImageNet's site gives, or ImageNet's training images.
source "$(dirname "$0")/common.sh"
recipe imagenet64 64 400000 50000 --vae none --global-batch-size 64 --lr 5e-4
all_systems DiT-S/4
