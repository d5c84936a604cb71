"""Part of sgpo_dist: cli."""
