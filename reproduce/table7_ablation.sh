#!/usr/bin/env bash
# Table 7: which terms of the PDE matter, on Oxford's flowers for 60,000 steps; the distance of 64 features on 256 samples.
# Other settings as table3_flowers.sh. DATA: where torchvision's flowers-102 lies.
source "$(dirname "$0")/common.sh"
recipe flowers102 64 60000 256 --vae none --global-batch-size 32 --lr 5e-4
if [ "$FEATURES" = inception ]; then metrics=(--feature-dim 64 --num-images 256); fi
system Baseline DiT-M/4 DiT-N/4 --mixer pdessm
system Diffusion+Reaction DiT-M/4 DiT-N/4 --mixer pdessm --pde-terms diffusion reaction
system Diffusion+Convection DiT-M/4 DiT-N/4 --mixer pdessm --pde-terms diffusion convection
system Convection DiT-M/4 DiT-N/4 --mixer pdessm --pde-terms convection
system Diffusion DiT-M/4 DiT-N/4 --mixer pdessm --pde-terms diffusion
system Reaction DiT-M/4 DiT-N/4 --mixer pdessm --pde-terms reaction
"$PYTHON" reproduce/tables.py "$ROWS"
