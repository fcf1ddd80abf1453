"""Networks of the book, built by plain functions from the shape of the data; each returns a plain ``nn.Module``."""

from .lenet import classic_lenet5, lenet5, small_cnn
from .mlp import lenet300, mlp
from .resnet import resnet

__all__ = ["classic_lenet5", "lenet5", "lenet300", "mlp", "resnet", "small_cnn"]
