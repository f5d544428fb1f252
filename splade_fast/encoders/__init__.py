"""Encoders of texts into sparse vectors."""
