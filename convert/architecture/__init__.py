"""Recognises an architecture: from diffusers' JSON files, an original yaml, or tensors' names and shapes."""
