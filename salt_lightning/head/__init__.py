"""The inside of the loss: chunks of products, and the pass over rows of logits."""
