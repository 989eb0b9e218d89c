"""Pictures in and out.

    folders.py        folders of images: which files, which classes, how a file becomes RGB
    named.py          the papers' data sets by name
    dataset.py        images as training sees them: cropped, replaced if they cannot be read
    autoencoder.py    pixels and latents, and the way from one to the other
    latents.py        latents in files; encode.py makes them
    samples.py        finished images: PNG, grids, .npz
    numbered.py       a folder of samples that a stopped run goes on to fill
"""
