"""Images: sources, decoding, the crop law, photometric augmentation, loading."""
