"""Benchmarks of kbit: `python -m benchmarks.run NAME`."""
