"""Calibration: text to token windows, the two activation streams, and the statistics gathered from them."""
