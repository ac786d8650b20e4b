"""Volumes that come with the package, and pairs made from them whose alignment is known."""
