"""Transfer evaluation: the paper's data sets and protocol, on any timm model."""
