#!/usr/bin/env bash
# Table 1: CIFAR-10, with the settings of Table 6. The patch is not stated; 2 makes 256 tokens.
# DATA: where cifar-10-batches-py lies. MSE is the loss on the test images.
source "$(dirname "$0")/common.sh"
recipe cifar10 32 400000 50000 --vae none --val-path "$data" --global-batch-size 64 --lr 5e-4
all_systems DiT-S/2
