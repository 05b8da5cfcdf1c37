"""Timings of every operator, every backend and every peer on one card, in one run."""
