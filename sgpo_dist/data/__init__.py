"""Where prompts, references and the two embedded models come from."""
