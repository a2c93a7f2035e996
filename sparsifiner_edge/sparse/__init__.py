"""Making a vision transformer sparse: token order, predictor, attention, in-place patch, students."""
