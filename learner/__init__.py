"""What differentiates: losses, batches, the DeepSpeed engine, the weight sender. Never imports actors."""
