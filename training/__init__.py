"""What train.py's loop calls: optimizer, one step, guard against bad numbers, the run folder with its checkpoints and logs."""
