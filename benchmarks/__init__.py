"""What bench.py times, a module for each of its subcommands."""
