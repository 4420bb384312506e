"""Corpora to tokens, and tokens to batches: sources, tokenizer, Megatron's indexed files, order, loader."""
