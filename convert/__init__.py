"""Tools of the checkout: convert official files to timm folders."""
