"""Conversion of official files to timm folders, and of models to torchvision and ONNX."""
