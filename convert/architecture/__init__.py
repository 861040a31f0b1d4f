"""Recognising what a checkpoint is: from diffusers' JSON files, an original yaml, or the tensors' names and shapes."""
