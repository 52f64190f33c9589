"""What features are worth: extraction, and classifiers on frozen features."""
