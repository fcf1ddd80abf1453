"""Networks of the book, built by plain functions from the shape of the data; each returns a plain ``nn.Module``."""

from .densenet import densenet
from .lenet import classic_lenet5, lenet5, small_cnn
from .maxout import maxout_net
from .mlp import lenet300, mlp
from .relation import relation_net
from .resnet import plain, resnet
from .vgg import vgg

__all__ = ["classic_lenet5", "densenet", "lenet5", "lenet300", "maxout_net", "mlp", "plain", "relation_net", "resnet",
           "small_cnn", "vgg"]
