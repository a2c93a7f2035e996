"""Distillation: a student learns from its teacher, on images, labelled or not."""
