"""Bulk jobs: rows of an input through a pipeline, into files and a manifest."""
