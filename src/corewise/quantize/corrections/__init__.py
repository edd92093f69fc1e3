"""Changes of weights and biases that win back accuracy: channel equalization, rounding, bias correction.

Each works on a ``graph.folded`` module in place and needs no labels. None is believed before it is measured: ``ptq``
keeps those that bring the simulated outputs nearer to fp32's.
"""

from corewise.quantize.corrections.biases import correct_bias
from corewise.quantize.corrections.channels import divide, equalize, smooth
from corewise.quantize.corrections.rounding import round_weights

__all__ = ["correct_bias", "divide", "equalize", "round_weights", "smooth"]
