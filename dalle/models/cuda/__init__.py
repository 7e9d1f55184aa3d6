"""Kernels written for CUDA, in Triton. Imported only where they run: torch brings Triton with its CUDA builds alone."""
