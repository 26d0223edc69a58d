"""Hot spots in fused form; model.py and positional say what they compute, these say how to do it with fewer bytes."""
