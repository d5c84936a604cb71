"""Part of sgpo_dist: report."""
