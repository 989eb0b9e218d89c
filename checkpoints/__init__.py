"""Models in files: reading, building, sharding, going on."""
