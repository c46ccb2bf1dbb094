"""Benchmarks of products and of whole models on a CPU."""
