"""Callbacks, one file for each concern."""
