"""Evaluation: distances of distributions, agreement with texts, and what a variation keeps of its source."""
