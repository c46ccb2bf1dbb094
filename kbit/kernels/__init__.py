"""Kernels, one operation a file: `triton` (portable), `cuda` (compiled at first use), `cpu`."""
