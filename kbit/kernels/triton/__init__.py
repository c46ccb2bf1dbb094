"""Triton kernels and their launchers. Importing this package does not import triton; its modules do."""
