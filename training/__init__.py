"""Parts of train.py: the update of weights, what is watched on the way, where numbers are shown."""
