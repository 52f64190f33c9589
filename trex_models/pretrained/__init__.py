"""Where weights come from, and what a file of weights is."""
