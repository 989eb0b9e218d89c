"""Pictures of mixers and of runs: each file measures plain numbers and draws them.

    layers.py      a network's mixers, and their inputs on the way from noise to an image
    page.py        functions that all pictures share; matplotlib
    kernels.py     Green's functions, of chosen coefficients or of a network's layers (the paper's Figure 1)
    maps.py        the results of layers for an image (Figure 6)
    reach.py       how far a layer sees
    spectrum.py    a layer's gain by spatial frequency
    curves.py      losses and probes of runs
    drift.py       how the PDE's coefficients moved in training
"""
