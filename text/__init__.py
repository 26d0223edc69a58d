"""Text to token shards: sources, tokenizers, the stream of tokens, the format of a shard; prepare_fineweb.py is made of it."""
