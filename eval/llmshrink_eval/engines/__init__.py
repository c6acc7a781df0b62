"""Engines other than transformers in this process."""
