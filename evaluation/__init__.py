"""How samples are compared with images.

    metrics.py     the metrics, as plain mathematics of features, and the one list of them
    features.py    the networks whose features they compare
    sides.py       references and samples: where they come from, and what a network makes of them
    report.py      comparing two sides, and what the numbers rest on
"""
