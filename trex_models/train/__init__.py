"""The reference trainer: ``python -m trex_models.train RECIPE --output DIR``."""
