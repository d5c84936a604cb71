"""Quality that can be computed exactly: a synthetic language of local repairs, and a small model that speaks it imperfectly."""
