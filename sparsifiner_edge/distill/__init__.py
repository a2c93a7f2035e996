"""Distillation: training of a sparse student towards its dense teacher, on images with or without labels."""
