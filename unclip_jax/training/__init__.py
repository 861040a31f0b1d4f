"""Training: objectives, optimisation, averages of weights."""
