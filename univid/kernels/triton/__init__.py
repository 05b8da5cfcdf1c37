"""Triton kernels: every operator on any GPU that Triton supports."""
