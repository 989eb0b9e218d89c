#!/usr/bin/env bash
# Table 3 of DiS (Fei et al., arXiv 2402.05608): CelebA at 64 x 64, with the recipe of table2_dis_cifar10.sh. DiS has patches of 2,
# and so 1,024 tokens; U-ViT has patches of 4. Crops are the middle square of the aligned images.
# DATA: the 162,770 training images of CelebA.
OBJECTIVE=${OBJECTIVE:-diffusion}
source "$(dirname "$0")/common.sh"
recipe celeba 64 500000 50000 --vae none --global-batch-size 128 --lr 1e-4 --warmup-steps 6358 --lr-schedule cosine \
    --max-grad-norm 1
system DiS DiS-S/2 DiS-N/4
system U-ViT U-ViT-S/4 U-ViT-N/4
system PDE-SSM-DiT-g DiT-S/2 DiT-N/4 --mixer pdessm-g
run_table
