"""Computes ADM's metrics between a reference and samples: Inception Score, FID, sFID, precision and recall.

    python evaluate.py VIRTUAL_imagenet256_labeled.npz samples/<folder>.npz          (as ADM's evaluator.py)
    python evaluate.py photos/test samples/<folder> --features efficientnet-lite0    (where Inception's weights are missing)
    python evaluate.py --make-ref photos/train photos.npz                            (a reference with its statistics)

A side is an .npz with arr_0 (uint8, N x H x W x 3), with statistics (mu, sigma, mu_s, sigma_s) or with both, or a folder
of images. Images pass through the network as a stream, and only their features are kept.
"""

import argparse
from pathlib import Path

from evaluation.features import add_feature_flags, open_network
from evaluation.metrics import Statistics, frechet_distance, inception_score, kernel_distance, precision_recall  # noqa: F401
from evaluation.report import compare, left_out, look_ahead, report, say
from evaluation.sides import Side, Source, make_reference, measure, open_source, read_features  # noqa: F401
from images.named import DATASETS
from machine.files import check_writable
from machine.flags import positive
from machine.processes import launch


def main(args, processes):
    check(**vars(args))
    prefix = "Internal " if args.halves else ""
    if args.features.endswith(".npz"):
        network, (ref, sample) = read_features(args.features, (args.ref, args.samples))
        say(left_out(ref, sample, network, args.kid).values(), processes)
    else:
        network = open_network(args.features, args.weights, args.feature_dim)
        if args.make_ref:
            folder, out = args.make_ref
            with processes.main_process_first():  # the files of a named data set may be joined when it is opened
                source = open_source(folder, network, args.image_size, args.dataset, args.num)
            say(source.remarks, processes)
            make_reference(source, out, network, processes, args.batch_size)
            return
        paths = [args.ref, args.ref] if args.halves else [args.ref, args.samples]
        parts = [slice(0, None, 2), slice(1, None, 2)] if args.halves else [slice(None)] * 2
        sources = [open_source(path, network, args.image_size, None, args.num, part) for path, part in zip(paths, parts)]
        look_ahead(*sources, network, processes, args.kid, prefix)
        ref, sample = (measure(source, network, processes, args.batch_size) for source in sources)
    if processes.rank == 0:
        results = compare(ref, sample, network, args.exact_distances, args.kid, prefix, progress=True)
        report(results, ref, sample, network, args.json, prefix)


# fmt: off
def check(
    ref, samples, make_ref, halves, num, features, weights, feature_dim, image_size, dataset, kid, exact_distances, json, **_,
):
    # fmt: on
    """Checks that the flags of these values can be combined. ValueError or OSError if not."""
    if make_ref and (ref or halves or features.endswith(".npz")):
        raise ValueError("--make-ref FOLDER OUT.npz stands alone")
    if make_ref and (json or kid or exact_distances):
        raise ValueError("--json, --kid and --exact-distances are for comparisons, not for --make-ref")
    sides = make_ref[:1] if make_ref else filter(None, (ref, samples))
    if image_size and (features.endswith(".npz") or all(Path(side).is_file() for side in sides)):
        raise ValueError("--image-size crops the images of folders, and there is none")
    if dataset and not (make_ref and not Path(make_ref[0]).is_file()):
        raise ValueError("--dataset says what the FOLDER of --make-ref holds, and means nothing without one")
    if halves and samples:
        raise ValueError("--halves compares one set with itself; leave SAMPLES out")
    if not make_ref and not (ref and (samples or halves)):
        raise ValueError("REF and SAMPLES are needed (or REF --halves, or --make-ref FOLDER OUT.npz)")
    if features.endswith(".npz") and (halves or num or weights or feature_dim):
        raise ValueError("--halves, --num, --weights and --feature-dim are for networks, not for features in a file")
    if kid and (feature_dim or 2048) != 2048:
        raise ValueError(f"--kid is not for --feature-dim {feature_dim}, which gives the Frechet distance alone")
    if json not in (None, "-"):
        check_writable(json, "--json", ".json")
    if make_ref:
        check_writable(make_ref[1], "--make-ref", ".npz")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="ADM's metrics between a reference and samples.")
    add = parser.add_argument
    add("ref", nargs="?", metavar="REF", help=".npz with arr_0, with statistics (mu, sigma, ...) or both; a folder of images")
    add("samples", nargs="?", metavar="SAMPLES", help="the same")
    add_feature_flags(add, ", or an .npz of features from elsewhere, whose arrays REF and SAMPLES name")
    add("--feature-dim", type=positive, metavar="N", help="layer of Inception by its channels: 64, 192, 768 or 2048 (default)")
    # torchrun takes --num for an abbreviation of an option of its own.
    add("--num", "--num-images", type=positive, metavar="N", help="take this many images of each side, evenly spread")
    add("--dataset", choices=DATASETS, help="which of the paper's data sets the FOLDER of --make-ref holds")
    add("--image-size", type=positive, help="crop a folder's images to squares of that side, as training does")
    add("--halves", action="store_true", help="compare REF's images of even and of odd number: the internal FID")
    add("--kid", action="store_true", help="also the kernel distance, by torch-fidelity")
    add("--exact-distances", action="store_true", help="precision and recall from float64 distances, where ADM has float16")
    add("--make-ref", nargs=2, metavar=("FOLDER", "OUT.npz"), help="write a reference: images and statistics")
    add("--json", metavar="FILE", help="write the numbers there as JSON; - prints nothing else")
    add("--batch-size", type=positive, help="images at a time and process; by default 64 on CUDA and 16 on CPUs")
    add("--device", help="cpu, cuda or cuda:N; by default cuda if there is any")
    return parser.parse_args(argv)


if __name__ == "__main__":
    launch(main, parse_args())
