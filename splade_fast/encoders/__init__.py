"""Encoders: texts -> sparse rows."""
