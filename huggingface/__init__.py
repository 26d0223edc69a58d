"""To and from Hugging Face: a run as a folder that `transformers` loads, and weights to start training from."""
