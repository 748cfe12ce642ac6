"""Everything that only a GPU can answer: python -m benchmarks.gpu."""
