"""Distillation: a student learns from its teacher, on pictures, labelled or not."""
