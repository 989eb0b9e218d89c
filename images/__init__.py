"""Pictures in and out: folders, data sets by name, autoencoders, cached latents, finished samples."""
