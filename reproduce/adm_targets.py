"""Checks that evaluate.py reproduces ADM's published numbers for its 50,000 ADM-G + ADM-U images and its reference batch:

    python -m reproduce.adm_targets VIRTUAL_imagenet256_labeled.npz admnet_guided_upsampled_imagenet256.npz

Both lie in https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/. Ends with status 1
if a number is further from ADM's than the change from TensorFlow to PyTorch can explain.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

PUBLISHED = {  # what ADM's evaluator.py printed, and the difference allowed
    "Inception Score": (215.84, 1.0),
    "FID": (3.943, 0.02),
    "sFID": (6.140, 0.05),
    "Precision": (0.8265, 0.005),
    "Recall": (0.5309, 0.005),
}


def main(flags):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "metrics.json")
        command = [sys.executable, str(Path(__file__).parent.parent / "evaluate.py"), *flags, "--json", str(out)]
        if status := subprocess.run(command).returncode:
            return status
        ours = json.loads(out.read_text())
    print(f"\n{'':16}{'published':>10}{'here':>10}{'allowed':>9}")
    for name, (value, allowed) in PUBLISHED.items():
        verdict = "" if abs(ours[name] - value) <= allowed else "  differs"
        print(f"{name:16}{value:>10}{ours[name]:>10.4f}{allowed:>9}{verdict}")
    return int(any(abs(ours[name] - value) > allowed for name, (value, allowed) in PUBLISHED.items()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
