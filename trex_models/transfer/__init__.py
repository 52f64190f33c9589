"""Transfer evaluation: the paper's datasets and protocol, for any timm model."""
