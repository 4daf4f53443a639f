"""From sources to batches: read, check, partition, tokenize, collate."""
