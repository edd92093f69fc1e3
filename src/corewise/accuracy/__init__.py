"""Outputs against fp32: metrics, fidelity and the gate."""
