#!/usr/bin/env bash
# Scaling: the held-out loss of DiTs of several widths, for each mixer, under flow matching at equal settings.
#
#     bash reproduce/scaling.sh DATA                     DATA holds train/ and test/
#     SIZES="S B L" PATCH=2 STEPS=100000 BATCH=256 LR=1e-4 bash reproduce/scaling.sh DATA        on a GPU
#
# From the environment: SIZES ("N64 N N128 N192", of 64 to 192 channels), PATCH (4), IMAGE_SIZE (32), MIXERS ("attention pdessm
# pdessm-g"), SEEDS ("0"), STEPS (1500), BATCH (64), LR (1e-3), FLAGS (more of train.py's), WORK (results/scaling), PYTHON.
# A stopped script that is started again goes on. python -m reproduce.scaling WORK then times a step of each, writes
# reproduce/results/scaling.json and a picture, and prints the table with fitted slopes.
set -euo pipefail
source "$(dirname "$0")/claim.sh"
begin "bash $0 DATA" "$@"
whole_numbers STEPS PATCH IMAGE_SIZE BATCH
WORK=${WORK:-results/scaling} STEPS=${STEPS:-1500}
claim "$WORK" "$data" "${PATCH:+, PATCH=$PATCH}${IMAGE_SIZE:+, IMAGE_SIZE=$IMAGE_SIZE}${BATCH:+, BATCH=$BATCH}${LR:+, LR=$LR}${FLAGS:+, FLAGS=$FLAGS}"
for seed in ${SEEDS:-0}; do
    for size in ${SIZES:-N64 N N128 N192}; do
        for mixer in ${MIXERS:-attention pdessm pdessm-g}; do
            folder=$WORK/$size-$mixer-$seed
            if [ -f "$folder/trained-$STEPS" ]; then continue; fi
            # shellcheck disable=SC2086
            "${PYTHON:-python}" train.py --model "DiT-$size/${PATCH:-4}" --mixer "$mixer" --objective flow --vae none --uncond \
                --image-size "${IMAGE_SIZE:-32}" --data-path "$data/train" --val-path "$data/test" --num-workers 0 \
                --global-batch-size "${BATCH:-64}" --lr "${LR:-1e-3}" --epochs 100000 --max-steps "$STEPS" \
                --ckpt-every $(((STEPS + 4) / 5)) --keep-last 1 --global-seed "$seed" --results-dir "$folder" --resume auto ${FLAGS:-}
            touch "$folder/trained-$STEPS"
        done
    done
done
"${PYTHON:-python}" -m reproduce.scaling "$WORK"
