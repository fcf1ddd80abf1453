"""Networks of the book, built by plain functions from the shape of the data; each returns a plain ``nn.Module``."""

from .densenet import densenet
from .lenet import classic_lenet5, lenet5, small_cnn
from .mlp import lenet300, mlp
from .resnet import plain, resnet
from .vgg import vgg

__all__ = ["classic_lenet5", "densenet", "lenet5", "lenet300", "mlp", "plain", "resnet", "small_cnn", "vgg"]
