"""Does our t-ReX do what the paper says? Trained and evaluated at the scale of a CPU."""
