"""What a weight version is, and the contract by which it travels and is proved."""
