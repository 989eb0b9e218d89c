#!/usr/bin/env bash
# Table 7: which terms of the PDE matter, on Oxford's flowers for 60,000 steps; the distance of 64 features on 256 samples.
# Other settings as in table3_flowers.sh. DATA: where torchvision's flowers-102 lies, or a folder of its 8,189 images.
source "$(dirname "$0")/common.sh"
recipe flowers102 64 60000 256 --vae none --global-batch-size 32 --lr 5e-4
if [ "$FEATURES" = inception ]; then metrics=(--feature-dim 64 --num-images 256); fi
pde_system Baseline DiT-M/4 DiT-N/4
pde_system Diffusion+Reaction DiT-M/4 DiT-N/4 --pde-terms diffusion reaction
pde_system Diffusion+Convection DiT-M/4 DiT-N/4 --pde-terms diffusion convection
pde_system Convection DiT-M/4 DiT-N/4 --pde-terms convection
pde_system Diffusion DiT-M/4 DiT-N/4 --pde-terms diffusion
pde_system Reaction DiT-M/4 DiT-N/4 --pde-terms reaction
run_table
