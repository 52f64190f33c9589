"""Pretrained weights: download, cache, checkpoint formats, licenses and timm folders."""
