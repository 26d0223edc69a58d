"""What is built on top of the six scripts, each a command: `python -m lab.NAME`."""
