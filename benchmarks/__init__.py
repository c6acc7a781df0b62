"""Benchmarks: time, memory and damage against the peers. None of it ships with the package."""
