"""Volumes on disk: the store and its pyramid, intensities and padding, points, and readers of every file format."""
