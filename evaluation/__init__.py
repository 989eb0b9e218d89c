"""Compares samples with images, and measures how likely images are.

    metrics.py     the metrics, as plain mathematics of features, and the one list of them
    features.py    the networks whose features they compare
    sides.py       references and samples: their images, statistics and features
    report.py      compares two sides, and reports what the numbers are based on
    likelihood.py  a command: bits per dimension of images under networks
"""
