"""What one client does between a broadcast and its update: objectives, batches, local steps."""
