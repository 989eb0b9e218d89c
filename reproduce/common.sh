# Functions that the scripts of the paper's tables share. A script names its data set and recipe, and then every system, which
# is trained, sampled, evaluated and added as a row to reproduce/results/<table>.jsonl. Started again, the script continues
# where it was stopped, even in the middle of training.
#
#     [SCALE=small] bash reproduce/table1_cifar10.sh DATA
#
# From the environment:
#   SCALE       full, the paper's; or small, on 2 CPU cores in minutes, to see that everything runs: tiny models on pixels,
#               few steps and images. DATA is then any folder of images, or holds train/ and test/
#   SIZE        if small, the side of the images, 32; DiT-N's patches are an eighth of it
#   PREDICT     of flow: velocity, or x, which pixels at larger patches need; if small, x from SIZE=64 on, whose patches are of
#               8 x 8
#   SEEDS       "0 1 2", or if small "0"
#   PRECISION   of training and sampling: fp32, or bf16. CPUs differ: an AMD EPYC (Zen 5) takes half the time with bf16, an
#               Intel Xeon without AMX 1.4 to 1.9 times as long
#   ONLY        names of the systems to run, all unless given
#   OBJECTIVE   flow, the paper's, or diffusion
#   FEATURES    of evaluate.py: inception, or if small efficientnet-lite0, whose weights come with its package
#   PROCESSES   of torchrun: the number of GPUs, or 1
#   REFERENCE   what samples are compared with: by default an .npz of the training images, which is made: statistics of all
#               and 10,000 images. ADM's VIRTUAL_imagenet256_labeled.npz is what Table 10's figures are usually taken from
#   IMAGES_OF   the images, if DATA holds their cached latents
#   BATCH       if small, 64
#   STEPS, IMAGES, SAMPLING_STEPS, PYTHON
#   WORK, ROWS  where runs and rows go, from the top of the repository
set -euo pipefail
source "$(dirname "$0")/claim.sh"
whole_numbers SIZE BATCH STEPS IMAGES SAMPLING_STEPS PROCESSES
if [ -n "${REFERENCE:-}" ]; then
    if [ ! -f "$REFERENCE" ]; then
        echo "REFERENCE=$REFERENCE: no such file; evaluate.py --make-ref makes one" >&2
        exit 2
    fi
    REFERENCE=$(realpath "$REFERENCE")
fi
if [ -n "${IMAGES_OF:-}" ]; then
    if [ ! -e "$IMAGES_OF" ]; then
        echo "IMAGES_OF=$IMAGES_OF: no such file or folder" >&2
        exit 2
    fi
    IMAGES_OF=$(realpath "$IMAGES_OF")
fi
begin "[SCALE=small] bash $0 DATA" "$@"
table=$(basename "$0" .sh) systems=()
SCALE=${SCALE:-full} OBJECTIVE=${OBJECTIVE:-flow} PRECISION=${PRECISION:-fp32} PYTHON=${PYTHON:-python}
if [ "$SCALE-$OBJECTIVE" = small-flow ] && [ "${SIZE:-32}" -ge 64 ]; then PREDICT=${PREDICT:-x}; fi
other=${SIZE:+-$SIZE}${PREDICT:+-$PREDICT}${BATCH:+-$BATCH}
if [ "$PRECISION" != fp32 ]; then other=$other-$PRECISION; fi
WORK=${WORK:-results/$table-$SCALE-$OBJECTIVE$other} ROWS=${ROWS:-reproduce/results/$table$other.jsonl}
case $SCALE-$OBJECTIVE in
    full-flow) sampler=heun SAMPLING_STEPS=${SAMPLING_STEPS:-125} ;; # 250 evaluations, as DiT's 250 steps
    full-diffusion) sampler=ddpm SAMPLING_STEPS=${SAMPLING_STEPS:-250} ;;
    small-flow) sampler=heun SAMPLING_STEPS=${SAMPLING_STEPS:-10} ;;
    small-diffusion) sampler=ddim SAMPLING_STEPS=${SAMPLING_STEPS:-20} ;;
    *)
        echo "SCALE is full or small and OBJECTIVE flow or diffusion, not $SCALE and $OBJECTIVE" >&2
        exit 2
        ;;
esac
claim "$WORK" "$data" ", $SCALE-$OBJECTIVE$other"
PROCESSES=${PROCESSES:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}

# recipe DATASET IMAGE_SIZE STEPS IMAGES FLAGS...: the paper's data, and flags of train.py for all systems
recipe() {
    if [ "$SCALE" = full ]; then
        SEEDS=${SEEDS:-0 1 2} FEATURES=${FEATURES:-inception} STEPS=${STEPS:-$3} IMAGES=${IMAGES:-$4}
        real=${IMAGES_OF:-$data} reference=(--dataset "$1" --image-size "$2")
        train=(--dataset "$1" --data-path "$data" --image-size "$2" --epochs 100000 "${@:5}")
        REFERENCE=${REFERENCE:-$WORK/reference-$FEATURES.npz}
    else
        SEEDS=${SEEDS:-0} FEATURES=${FEATURES:-efficientnet-lite0} STEPS=${STEPS:-200} IMAGES=${IMAGES:-256}
        real=$data
        local held_out=()
        if [ -d "$data/train" ]; then real=$data/train; fi
        if [ -d "$data/test" ]; then held_out=(--val-path "$data/test"); fi
        reference=(--image-size "${SIZE:-32}" --num-images "$IMAGES")
        train=(--vae none --uncond --image-size "${SIZE:-32}" --num-workers 0 --epochs 100000)
        train+=(--global-batch-size "${BATCH:-64}" --lr 1e-3)
        train+=(--data-path "$real" ${held_out[@]+"${held_out[@]}"})
        REFERENCE=${REFERENCE:-$WORK/reference-$FEATURES-$IMAGES.npz}
    fi
    if [ -n "${PREDICT:-}" ]; then train+=(--predict "$PREDICT"); fi
    metrics=()
}

# system NAME FULL_MODEL SMALL_MODEL FLAGS...: one system of the table, with flags of train.py of its own
system() {
    systems+=("$*")
}

# run_system NAME FULL_MODEL SMALL_MODEL FLAGS...: trains, samples, evaluates and records it with every seed
run_system() {
    local name=$1 model=$2 seed run samples
    if [ -n "${ONLY:-}" ] && [[ " $ONLY " != *" $name "* ]]; then return; fi
    if [ "$SCALE" = small ]; then model=${3/#DiT-N\/4/DiT-N\/$((${SIZE:-32} / 8))}; fi
    for seed in $SEEDS; do
        folder=$WORK/$name-$seed run=$STEPS-$SAMPLING_STEPS-$IMAGES-$FEATURES
        samples=$folder/samples-$STEPS-$SAMPLING_STEPS-$IMAGES
        if recorded; then continue; fi
        mkdir -p "$folder"
        if [ ! -f "$REFERENCE" ]; then # made first, so that missing files for evaluation show before the work
            run evaluate.py --make-ref "$real" "$REFERENCE" "${reference[@]}" --features "$FEATURES"
        fi
        if [ ! -f "$folder/trained-$STEPS" ]; then # a checkpoint alone may come from a run that was stopped before its loss
            run train.py --model "$model" "${train[@]}" --objective "$OBJECTIVE" --precision "$PRECISION" \
                --max-steps "$STEPS" --global-seed "$seed" --results-dir "$folder" --resume auto "${@:4}"
            if [ -z "$(checkpoint)" ]; then
                echo "$folder was trained for more than STEPS=$STEPS and has no checkpoint there: give another WORK" >&2
                exit 2
            fi
            touch "$folder/trained-$STEPS"
        fi
        run sample_ddp.py --ckpt "$(checkpoint)" --sampler $sampler --num-sampling-steps "$SAMPLING_STEPS" \
            --precision "$PRECISION" --cfg-scale "${cfg:-1}" --num-fid-samples "$IMAGES" --global-seed "$seed" --sample-dir "$samples"
        run evaluate.py "$REFERENCE" "$(echo "$samples"/*.npz)" --features "$FEATURES" ${metrics[@]+"${metrics[@]}"} \
            --json "$folder/metrics.json"
        "$PYTHON" -m reproduce.tables --record "$ROWS" "$table" "$SCALE" "$name" "$folder" "$(checkpoint)"
        echo "$REFERENCE" > "$folder/recorded-$run"
    done
}

# pde_system NAME FULL_MODEL SMALL_MODEL FLAGS...: --mixer pdessm with either coupling that the paper's figures may be of:
# diagonal, its Equations 5 to 10 for each channel, and pairwise, its Algorithm 1
pde_system() {
    local coupling
    for coupling in diagonal pairwise; do
        system "$1-$coupling" "$2" "$3" --mixer pdessm --pde-coupling $coupling "${@:4}"
    done
}

# all_systems DIT: the paper's three and ours, with a DiT of that name, and the table. In -gla the coefficients of the PDEs learn
# at five times the rate, which docs/results.md has the reasons for; the other networks have none or keep to the paper's recipe.
all_systems() {
    system DiT "$1" DiT-N/4
    system U-Net UNet-S UNet-N
    pde_system PDE-SSM-DiT "$1" DiT-N/4
    system PDE-SSM-DiT-g "$1" DiT-N/4 --mixer pdessm-g
    system PDE-SSM-DiT-gla "$1" DiT-N/4 --mixer pdessm-gla --lr-coefficients 5
    run_table
}

# run_table: runs the systems and prints the table. A name in ONLY that no system has ends the script before any work.
run_table() {
    local system
    known_words ONLY "this table's systems" "${systems[@]%% *}"
    for system in "${systems[@]}"; do run_system $system; done
    "$PYTHON" -m reproduce.tables "$ROWS"
}

# recorded: tells whether the run has its row, and by this reference; older markers are empty and do not say
recorded() {
    [ -f "$folder/recorded-$run" ] && [[ ! -s $folder/recorded-$run || $(cat "$folder/recorded-$run") = "$REFERENCE" ]]
}

checkpoint() {
    compgen -G "$folder/*/checkpoints/$(printf %07d "$STEPS").pt" || true
}

# run COMMAND...: on all processes; the seconds it took, to its end or failure, and what it was go to the run's commands.txt
run() {
    local start=$SECONDS command=$* status=0
    if [ "$PROCESSES" -gt 1 ]; then set -- -m torch.distributed.run --standalone --nproc_per_node="$PROCESSES" "$@"; fi
    echo "$PYTHON $*" >&2
    "$PYTHON" "$@" || status=$?
    echo "$((SECONDS - start)) $PROCESSES ${command//"$data"/DATA}" >> "$folder/commands.txt"
    return $status
}
