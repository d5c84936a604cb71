"""The durable buffer: prompts, leases, pairs and the training journal in one SQLite file."""
