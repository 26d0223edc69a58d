"""Triton kernels, each beside a reference in plain PyTorch that the tests hold it to."""
