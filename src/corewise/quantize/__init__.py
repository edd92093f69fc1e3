"""Quantization: what is done to a program before an engine runs it in int8."""
