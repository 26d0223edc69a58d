"""What the six scripts stand on: configuration, data, attention, ranks, optimizer, checkpoints, the run folder, errors."""
