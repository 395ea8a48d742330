"""A table of what ran on the GPUs, at the end."""

from tests.gpu.conftest import own_cache_folder, pytest_terminal_summary

__all__ = ["own_cache_folder", "pytest_terminal_summary"]
