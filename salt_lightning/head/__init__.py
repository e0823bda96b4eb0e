"""Internals of the loss: the chunked products, and the pass over rows of logits."""
