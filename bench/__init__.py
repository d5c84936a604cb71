"""Ratios of this project against the usual ways of doing the same work, measured side by side on the machine at hand."""
