"""Reproduction of the paper, from images to its table and figure."""
