"""Accuracy of a student or bundle, measured against its dense teacher."""
