"""Sparse vision transformers: token order, predictor, attention, in-place patching and student folders."""
