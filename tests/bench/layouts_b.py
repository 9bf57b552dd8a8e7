"""Fixtures of more file data sets; see `layouts`."""
