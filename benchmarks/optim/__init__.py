"""Benchmarks of optimizer steps, paired in one run with torch and bitsandbytes."""
