"""Fused memory-bound operations, each beside its reference in plain torch. Products of matrices are cuBLAS's."""
