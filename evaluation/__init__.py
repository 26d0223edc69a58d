"""How an evaluation set is cut into windows, and how its results are drawn."""
