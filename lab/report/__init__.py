"""The page about a set of runs: what they say, as tables, plots and samples."""
