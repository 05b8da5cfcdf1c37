"""Clips, conditioning, the autoencoder and video files."""
