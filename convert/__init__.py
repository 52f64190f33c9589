"""Tools of the checkout: official files to timm folders, models to torchvision and ONNX."""
