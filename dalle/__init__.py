"""Tessera: a trainer for text-to-image models."""
