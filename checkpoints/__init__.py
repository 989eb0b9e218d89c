"""Models in files: reading, building, exporting and sharding them, and resuming runs."""
