"""Tests that need an NVIDIA GPU, and the ten checks of docs/gpu-sharing.md.

They run on the mock GPU too: `PYTHONPATH=tests python -m mock_gpu python -m pytest tests/gpu`.
"""
