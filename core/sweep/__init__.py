"""Sets of runs: which exist, what is left of them, how they are started; table1.py and lab.sweep are made of it."""
