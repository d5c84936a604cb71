"""Part of sgpo_dist: evaluate."""
