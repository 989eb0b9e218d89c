#!/usr/bin/env bash
# Table 2 of DiS (Fei et al., arXiv 2402.05608): CIFAR-10 without classes, with the paper's and its code's recipe: diffusion,
# AdamW at 1e-4 without decay, five epochs of warm-up, a cosine (which ends at 0 here and at 1e-6 there), gradients clipped at 1.
# U-ViT's figure in that table is of its own recipe; here all have the same.
# DATA: where cifar-10-batches-py lies.
OBJECTIVE=${OBJECTIVE:-diffusion}
source "$(dirname "$0")/common.sh"
recipe cifar10 32 500000 50000 --vae none --val-path "$data" --uncond --global-batch-size 128 --lr 1e-4 --warmup-steps 1953 \
    --lr-schedule cosine --max-grad-norm 1
system DiS DiS-S/2 DiS-N/4
system U-ViT U-ViT-S/2 U-ViT-N/4
system PDE-SSM-DiT-g DiT-S/2 DiT-N/4 --mixer pdessm-g
run_table
