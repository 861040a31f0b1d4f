"""The stages of scripts/benchmarks/gpu, each with a function `measure`."""
