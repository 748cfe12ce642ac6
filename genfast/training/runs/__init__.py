"""Runs: their settings, the loop, and the files it leaves in a folder."""
