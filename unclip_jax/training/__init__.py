"""Training: objectives, optimisers, EMA, and whole runs."""
