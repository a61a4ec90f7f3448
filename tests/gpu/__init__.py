"""Tests that need an NVIDIA GPU; without one each is skipped and says so."""
