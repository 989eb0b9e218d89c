"""Scripts and modules that reproduce results of the paper, one for each."""
