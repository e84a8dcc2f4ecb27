"""A candidate -> an artifact: compiled kernels and linked libraries."""
