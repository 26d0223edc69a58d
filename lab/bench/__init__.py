"""What lab.bench times, a module for each of its subcommands."""
