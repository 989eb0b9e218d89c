#!/usr/bin/env bash
# The comparison of all mixers and systems at equal settings: each is trained for as many steps on the same images, noise and
# timesteps, then samples are drawn and compared with images, and the likelihood of held-out images is measured. Every finished
# run is a row, written at once; started again, the script goes on with what is missing, in the middle of a run too.
#
#     CIFAR10=FOLDER FLOWERS=FOLDER bash reproduce/every_mixer.sh        (or one of the two)
#
# The folders hold train/<class>/ and test/<class>/: CIFAR-10 at 32 x 32, in patches of 4 x 4 with classes, and flowers at
# 64 x 64, in patches of 8 x 8 without classes, where the networks predict the clean image: 64 tokens each. What cannot be
# trained, because it diverges or does not fit, is a row that says so; delete its row.json to try again.
#
# From the environment:
#   STEPS       of training, at batch 64 and learning rate LR=1e-3; 1200
#   SEEDS       "0 1 2"
#   ONLY        names of the rows to run, all of `python -m reproduce.every_mixer --names` unless given
#   IMAGES      samples to draw; 5000. With 0 none, and a later call can draw them
#   BITS        held-out images whose bits per dimension are measured, by networks that predict no clean image; 256. 0 is none
#   PRECISION   of training and sampling: fp32, or bf16. CPUs differ: an AMD EPYC (Zen 5) takes half the time with bf16, an
#               Intel Xeon without AMX 1.4 to 1.9 times as long
#   OBJECTIVE   flow, or diffusion for CIFAR-10. Samplers take 12 evaluations: 6 steps of heun, or 12 of dpm-solver
#   WORK        where runs go; results/every_mixer, or with LR every_mixer-lr-$LR
#   PYTHON, RESULTS (the .json of all rows, in reproduce/results, named as WORK is)
set -euo pipefail
if [ -z "${CIFAR10:-}${FLOWERS:-}" ]; then
    echo "usage: CIFAR10=FOLDER FLOWERS=FOLDER bash $0        (or one of the two)" >&2
    exit 2
fi
CIFAR10=${CIFAR10:+$(realpath "$CIFAR10")} FLOWERS=${FLOWERS:+$(realpath "$FLOWERS")}
other=every_mixer${LR:+-lr-$LR}
WORK=$(realpath -m "${WORK:-results/$other}") RESULTS=$(realpath -m "${RESULTS:-$(dirname "$0")/results/$other.json}")
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python} STEPS=${STEPS:-1200} IMAGES=${IMAGES:-5000} BITS=${BITS:-256}
OBJECTIVE=${OBJECTIVE:-flow} PRECISION=${PRECISION:-fp32}
case $OBJECTIVE in
    flow) sampler=heun sampling_steps=6 predict=(--predict x) ;;
    diffusion) sampler=dpm-solver sampling_steps=12 predict=() ;;
    *) echo "OBJECTIVE is flow or diffusion, not $OBJECTIVE" >&2 && exit 2 ;;
esac

source reproduce/claim.sh
whole_numbers STEPS
for name in IMAGES BITS; do
    if [ "${!name}" != 0 ]; then whole_numbers $name; fi
done

# compare SET FOLDER PATCH REFERENCE FLAGS...: every row on one data set, with one seed
compare() {
    local set=$1 data=$2 patch=$3 reference=$WORK/$1-efficientnet.npz images=$4 name flags
    claim "$WORK/$set" "$data" # whose reference all settings share
    claim "$WORK/$set-$OBJECTIVE-$STEPS-$PRECISION" "$data" "${LR:+, LR=$LR}"
    if [ "$IMAGES" != 0 ] && [ ! -f "$reference" ]; then
        mkdir -p "$WORK"
        "$PYTHON" evaluate.py --make-ref "$images" "$reference" --features efficientnet-lite0
    fi
    while IFS=$'\t' read -r name flags; do
        if [ -z "${ONLY:-}" ] || [[ " $ONLY " == *" $name "* ]]; then one $flags "${@:5}" < /dev/null; fi
    done < <("$PYTHON" -m reproduce.every_mixer --names "$patch")
}

# one FLAGS...: one run of train.py with these flags, its samples and bits, and its row after each
one() {
    folder=$WORK/$set-$OBJECTIVE-$STEPS-$PRECISION/$name-$seed
    mkdir -p "$folder"
    if [ ! -f "$folder/row.json" ]; then
        run train.py --vae none --data-path "$data/train" --val-path "$data/test" --objective "$OBJECTIVE" --num-workers 0 \
            --global-batch-size 64 --lr "${LR:-1e-3}" --precision "$PRECISION" \
            --max-steps "$STEPS" --epochs 100000 --global-seed "$seed" \
            --ckpt-every 100 --keep-last 1 --resume auto --results-dir "$folder" "$@" || return 0
        record
    fi
    checkpoint=$(echo "$folder"/*/checkpoints/"$(printf %07d "$STEPS")".pt)
    if [ "$BITS" != 0 ] && [[ $* != *"--predict x"* ]] && missing bits_per_dimension; then
        run -m evaluation.likelihood --ckpt "$checkpoint" --data-path "$data/test" --num-images "$BITS" --steps 10 \
            --json "$folder/bits.json" || return 0
        record
    fi
    if [ "$IMAGES" != 0 ] && missing metrics; then
        run sample_ddp.py --ckpt "$checkpoint" --sampler $sampler --num-sampling-steps $sampling_steps --cfg-scale 1 \
            --num-fid-samples "$IMAGES" --per-proc-batch-size 100 --precision "$PRECISION" --global-seed "$seed" \
            --sample-dir "$folder/samples" --evaluate "$reference" --features efficientnet-lite0 || return 0
        record
        rm -rf "$folder/samples"
    fi
}

# missing NAME: whether the run has a row without this measurement, which it could have
missing() {
    ! grep -q "^ \"\($1\|failure\)\"" "$folder/row.json"
}

# run COMMAND...: with its seconds in the run's commands.txt. What fails is a row with the last line that it printed; what was
# stopped from outside ends the script.
run() {
    local start=$SECONDS command=$* status=0
    echo "$set, seed $seed, $name: $1" >&2
    "$PYTHON" "$@" > "$folder/output.txt" 2>&1 || status=$?
    echo "$((SECONDS - start)) $(without_paths "$command")" >> "$folder/commands.txt"
    if [ $status -eq 75 ] || [ $status -gt 128 ]; then
        echo "stopped; start this script again to go on" >&2
        exit $status
    fi
    if [ $status -ne 0 ]; then record "$(without_paths "$(tr '\r' '\n' < "$folder/output.txt" | tail -n 1)")"; fi
    return $status
}

without_paths() {
    local text=${1//"$data"/DATA}
    echo "${text//"$WORK/"/}"
}

# record [FAILURE]: writes the run's row, and all rows to $RESULTS
record() {
    "$PYTHON" -m reproduce.every_mixer --record "$folder" "$set" "$name" "$seed" "$STEPS" "$OBJECTIVE" "${1:-}" \
        --collect "$WORK" "$RESULTS" > "$WORK/table.md"
}

if [ -n "${ONLY:-}" ]; then known_words ONLY "the rows" $("$PYTHON" -m reproduce.every_mixer --names 4 | cut -f 1); fi
for seed in ${SEEDS:-0 1 2}; do
    if [ -n "$CIFAR10" ]; then compare cifar10 "$CIFAR10" 4 "$CIFAR10/test" --image-size 32 --num-classes 10; fi
    if [ -n "$FLOWERS" ]; then
        compare flowers "$FLOWERS" 8 "$FLOWERS" --image-size 64 --uncond ${predict[@]+"${predict[@]}"}
    fi
done
"$PYTHON" -m reproduce.every_mixer --collect "$WORK" "$RESULTS"
