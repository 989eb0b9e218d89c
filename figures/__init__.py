"""Pictures of what mixers do and how runs went: each file measures plain numbers, and draws them.

    layers.py      a network's mixers, and what they are given on the way from noise to an image
    page.py        what the pictures have in common; matplotlib
    kernels.py     Green's functions, of chosen coefficients or of a network's layers (the paper's Figure 1)
    maps.py        what layers make of an image (Figure 6)
    reach.py       how far a layer sees
    spectrum.py    a layer's gain by spatial frequency
    curves.py      losses and probes of runs
    drift.py       how the PDE's coefficients moved in training
"""
