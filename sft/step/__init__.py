"""One optimizer step on packed rows: micro-batches, attention, loss, and how the layers compute."""
