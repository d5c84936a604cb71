"""Starter data written for this project: ``orders`` (notes and their JSON, generated) and ``chat`` (everyday prompts, packaged)."""
