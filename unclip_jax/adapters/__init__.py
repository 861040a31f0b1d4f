"""Adapters, which change a network's weights: low-rank adapters (LoRA) and textual inversion embeddings."""
