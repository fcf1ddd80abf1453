"""Every fast path of the Fisher information beside a slow, obvious one."""

import copy
import gc
import math
from contextlib import nullcontext, suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from fishlib import fisher, natural_gradient, nets, per_sample


def loop_diagonal(net, images, labels, kind):
    """Mean over samples of squared gradients, one sample and one class at a time."""
    parameters = dict(net.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for i in range(len(images)):
        logs = net(images[i:i + 1]).log_softmax(1)[0]
        classes = range(len(logs)) if kind == "exact" else [int(labels[i])]
        for c in classes:
            gradients = torch.autograd.grad(logs[c], list(parameters.values()), retain_graph=True, allow_unused=True,
                                            materialize_grads=True)
            weight = logs[c].exp().detach() if kind == "exact" else 1.0
            for name, g in zip(parameters, gradients, strict=True):
                total[name] += weight * g.square()
    return {name: value.detach() / len(images) for name, value in total.items()}


def relative_error(found, expected):
    a, b = torch.cat([v.flatten() for v in found.values()]), torch.cat([v.flatten() for v in expected.values()])
    assert a.shape == b.shape
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300))


def trained_statistics(net):
    """Running statistics and affine parameters that are not the identity."""
    generator = torch.Generator().manual_seed(5)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    for p in net.parameters():
        p.data.add_(0.1 * torch.randn(p.shape, generator=generator))
    return net


class Tied(nn.Module):
    """One matrix embeds tokens and gives the logits; a module is used twice; a bare parameter scales."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 6, padding_idx=0)
        self.mix = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(6))
        self.norm = nn.LayerNorm(6)

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = self.norm(x + torch.tanh(self.mix(torch.tanh(self.mix(x * self.scale)))))
        return F.linear(x.mean(1), self.embedding.weight)


class Functional(nn.Module):
    """No modules: convolution, matrix product and bias by functions; the two branches do not meet before the sum."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 2, 3, 3) / 3)
        self.matrix = nn.Parameter(torch.randn(4, 5))
        self.side = nn.Parameter(torch.randn(5, 2 * 36) / 8)
        self.shift = nn.Parameter(torch.zeros(5))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x):
        maps = F.conv2d(x, self.kernel, padding=1).relu().mean((2, 3))
        return maps @ self.matrix + F.linear(x.flatten(1), self.side, self.shift)


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(5, 3, 3, padding=1)
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.cat([x, self.a(x).relu_()], 1)
        x = torch.cat([x, F.relu(self.b(x), inplace=True)], 1)
        return self.out(x.mean((2, 3)))


class SequenceFirst(nn.Module):
    """As many positions as samples, positions first: shapes alone do not tell them apart."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.inner(x.transpose(0, 1))).mean(0))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.rnn(x)[0][:, -1])


class Branching(nn.Module):
    """Python control flow on values, which vmap cannot follow."""

    def __init__(self):
        super().__init__()
        self.scale, self.out = nn.Parameter(torch.randn(4)), nn.Linear(4, 3)

    def forward(self, x):
        x = x * self.scale
        return self.out(x.sin()) if bool(x.isfinite().all()) else self.out(x)


def convolutions(*layers, features, classes=4):
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, classes))


NETS = {
    "mlp": lambda: (nets.mlp((1, 5, 5), 4, (7, 6)), (1, 5, 5)),
    "linear without bias": lambda: (nn.Sequential(nn.Flatten(), nn.Linear(9, 3, bias=False)), (1, 3, 3)),
    "lenet": lambda: (nets.classic_lenet5(3, (1, 12, 12)), (1, 12, 12)),
    "caffe lenet": lambda: (convolutions(nn.Conv2d(1, 5, 5), nn.MaxPool2d(2), nn.Tanh(), features=45), (1, 10, 10)),
    "batchnorm": lambda: (nets.small_cnn(4, (1, 8, 8), width=3), (1, 8, 8)),
    "residual": lambda: (nets.resnet(8, 3, width=3), (3, 8, 8)),
    "dense": lambda: (Dense(), (2, 5, 5)),
    "strided, dilated": lambda: (convolutions(nn.Conv2d(2, 3, (3, 2), (2, 1), (1, 2), (2, 3)), nn.ReLU(inplace=True),
                                              features=96), (2, 9, 7)),
    "groups": lambda: (convolutions(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), features=54), (4, 5, 5)),
    "depthwise": lambda: (convolutions(nn.Conv2d(3, 6, 3, padding="same", groups=3), nn.Conv2d(6, 4, 1), nn.ReLU(),
                                       features=64), (3, 4, 4)),
    "same, even kernel": lambda: (convolutions(nn.Conv2d(2, 3, (4, 2), padding="same", dilation=(1, 3)), nn.ReLU(),
                                               nn.Conv2d(3, 8, (2, 4), padding="same"), features=128), (2, 4, 4)),
    "circular padding": lambda: (convolutions(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.ReLU(),
                                              features=48), (2, 4, 4)),
    "conv1d": lambda: (convolutions(nn.Conv1d(2, 4, 3, 2, 1), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 3, 2),
                                    features=12), (2, 9)),
    "conv3d": lambda: (convolutions(nn.Conv3d(1, 3, (3, 2, 2)), nn.ReLU(), features=48), (1, 4, 3, 5)),
    "groupnorm": lambda: (convolutions(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.GroupNorm(1, 4),
                                       features=36), (2, 5, 5)),
    "sequence": lambda: (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.LayerNorm((5, 4)), nn.Flatten(),
                                       nn.BatchNorm1d(20), nn.Linear(20, 3)), (5, 3)),
    "attention": lambda: (nn.Sequential(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), nn.Flatten(),
                                        nn.Linear(12, 3)), (3, 4)),
    "transposed convolution": lambda: (convolutions(nn.ConvTranspose2d(2, 3, 3), nn.Tanh(), features=48), (2, 2, 2)),
    "functional": lambda: (Functional(), (2, 6, 6)),
    "sequence first": lambda: (SequenceFirst(), (5, 3)),
    "recurrent": lambda: (Recurrent(), (3, 3)),
    "value-dependent": lambda: (Branching(), (4,)),
    "tied": lambda: (Tied(), None),
}


def build(name, samples=5):
    torch.manual_seed(3)
    net, shape = NETS[name]()
    net = trained_statistics(net).double().eval()
    images = torch.randint(7, (samples, 4)) if shape is None else torch.randn(samples, *shape, dtype=torch.float64)
    classes = net(images).shape[1]
    return net, images, torch.randint(classes, (samples,))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("name", NETS)
def test_diagonal_and_trace_equal_the_loop_over_samples_and_classes(name, kind):
    net, images, labels = build(name)
    expected = loop_diagonal(net, images, labels, kind)
    assert relative_error(fisher.diagonal(net, (images, labels), kind), expected) < 1e-6
    found = fisher.trace(net, [(images[:2], labels[:2]), (images[2:], labels[2:])], kind)
    assert found.value == pytest.approx(sum(float(v.sum()) for v in expected.values()), rel=1e-6)
    for layer, part in found.layers.items():
        own = sum(float(v.sum()) for n, v in expected.items() if n.rpartition(".")[0] == layer)
        assert part.value == pytest.approx(own, rel=1e-6)
    single = images if name == "tied" else images.float()
    assert relative_error(fisher.diagonal(net.float(), (single, labels), kind), expected) < 1e-4


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_convolutions_drawn_at_random_equal_the_loop(data):
    draw = data.draw
    dims, groups = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    channels, maps = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3))
    kernel, stride = [[draw(st.integers(1, 3)) for _ in range(dims)] for _ in range(2)]
    dilation, padding = [draw(st.integers(1, 2)) for _ in range(dims)], [draw(st.integers(0, 2)) for _ in range(dims)]
    size = [draw(st.integers(5, 7)) for _ in range(dims)]
    torch.manual_seed(draw(st.integers(0, 99)))
    layer = (nn.Conv1d, nn.Conv2d)[dims - 1](channels, maps, kernel, stride, padding, dilation, groups, draw(st.booleans()))
    images = torch.randn(draw(st.integers(1, 4)), channels, *size)
    net = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(layer(images).flatten(1).shape[1], draw(st.integers(2, 4))))
    net, images = net.double(), images.double()
    labels = torch.zeros(len(images), dtype=torch.int64)
    for kind in ("exact", "empirical"):
        assert relative_error(fisher.diagonal(net, (images, labels), kind), loop_diagonal(net, images, labels, kind)) < 1e-6


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(2, 6), st.floats(0, 60), st.integers(0, 99))
def test_columns_are_a_square_root_of_the_softmax_information(samples, classes, scale, seed):
    outputs = scale * torch.randn(samples, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    p = outputs.softmax(1)
    columns = fisher.Softmax().columns(outputs)
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    assert columns.shape == (samples, classes - 1, classes)
    assert torch.allclose(columns.transpose(1, 2) @ columns, expected, atol=1e-12)


def test_batches_of_any_size_give_the_same_mean():
    net, images, labels = build("batchnorm", 11)
    whole = fisher.diagonal(net, (images, labels))
    parts = zip(images.split(4), labels.split(4), strict=True)
    assert relative_error(fisher.diagonal(net, parts), whole) < 1e-12
    assert relative_error(fisher.diagonal(net, images), whole) < 1e-12
    assert relative_error(fisher.diagonal(net, [images, labels]), whole) < 1e-12
    assert relative_error(fisher.diagonal(net, [images[:5], images[5:]]), whole) < 1e-12


@pytest.mark.parametrize("call", [
    fisher.diagonal, lambda net, batches: fisher.vector_product(net, batches, {"weight": torch.tensor([[1.0], [0.0]])})])
def test_means_over_many_batches_in_half_precision_do_not_stop_growing(call):
    net = nn.Linear(1, 2)
    for p in net.parameters():
        nn.init.zeros_(p)
    batches = [torch.full((1, 1), 1.0)] * 60 + [torch.full((1, 1), 3.0)] * 540
    expected = call(net, batches)
    found = call(copy.deepcopy(net).bfloat16(), [images.bfloat16() for images in batches])
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert relative_error(found, expected) < 0.01


@pytest.mark.parametrize("large", [0, 1 << 18])
def test_columns_that_do_not_fit_together_are_done_in_parts(monkeypatch, large):
    net, images, labels = build("lenet", 7)
    whole = fisher.diagonal(net, (images, labels))
    monkeypatch.setattr(fisher, "COLUMN_ELEMENTS", 10_000)
    monkeypatch.setattr(fisher, "LARGE", large)
    monkeypatch.setattr("fishlib.per_sample.CHUNK", 50)
    assert relative_error(fisher.diagonal(net, (images, labels)), whole) < 1e-12

@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["tied", "functional", "groups", "recurrent", "wide"])
def test_samples_that_do_not_fit_together_are_done_one_after_the_other(monkeypatch, name):
    monkeypatch.setitem(NETS, "wide", lambda: (nn.Linear(150, 3), (150,)))
    net, images, _ = build(name, 7)
    whole, trace = fisher.diagonal(net, images), fisher.trace(net, images)
    monkeypatch.setattr(per_sample, "CHUNK", 1)
    assert relative_error(fisher.diagonal(net, images), whole) < 1e-12
    found = fisher.trace(net, images)
    assert (found.value, found.standard_error) == (pytest.approx(trace.value), pytest.approx(trace.standard_error))


def test_normalisations_have_the_constant_that_they_were_given():
    torch.manual_seed(0)
    net = convolutions(nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4, eps=0.3), nn.Tanh(), nn.GroupNorm(2, 4, eps=0.3),
                       nn.LayerNorm((3, 3), eps=0.3), features=36)
    net = trained_statistics(net).double().eval()
    images, labels = torch.randn(4, 1, 4, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    assert relative_error(fisher.diagonal(net, images), loop_diagonal(net, images, labels, "exact")) < 1e-6


def test_chosen_parameters_alone_are_computed_also_frozen_ones():
    net, images, labels = build("residual")
    whole = fisher.diagonal(net, (images, labels))
    name, frozen = list(net.named_parameters())[3]
    frozen.requires_grad_(False)
    found = fisher.diagonal(net, (images, labels), parameters=[name, net.fc.bias])
    assert list(found) == [name, "fc.bias"]
    assert relative_error(found, {name: whole[name] for name in found}) < 1e-12
    assert name not in fisher.diagonal(net, (images, labels))


# Closed forms ---------------------------------------------------------------------------------------------------------------
def test_a_parameter_given_by_two_names_counts_once():
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    net[2].weight = net[0].weight
    images = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = fisher.diagonal(net, images)["0.weight"]
    found = fisher.diagonal(net, images, parameters=["0.weight", "2.weight", net[2].weight])
    assert list(found) == ["0.weight"]
    assert torch.allclose(found["0.weight"], expected)


def test_logistic_regression_has_its_closed_form():
    torch.manual_seed(0)
    net, images = nn.Linear(4, 2).double(), torch.randn(30, 4, dtype=torch.float64)
    p = net(images).softmax(1).detach()[:, 1]
    expected = ((p * (1 - p))[:, None] * images.square()).mean(0)
    found = fisher.diagonal(net, images)
    assert torch.allclose(found["weight"], expected.expand(2, -1))
    assert torch.allclose(found["bias"], (p * (1 - p)).mean().expand(2))


def test_linear_softmax_layer_has_its_closed_form():
    torch.manual_seed(0)
    net, images = nn.Linear(4, 5).double(), torch.randn(30, 4, dtype=torch.float64)
    p = net(images).softmax(1).detach()
    assert torch.allclose(fisher.diagonal(net, images)["weight"], (p * (1 - p)).T @ images.square() / 30)


def test_gaussian_likelihood_has_its_closed_form():
    torch.manual_seed(0)
    net, images = nn.Linear(4, 3).double(), torch.randn(50, 4, dtype=torch.float64)
    gaussian = fisher.Gaussian(std=0.5)
    expected = images.square().mean(0) / 0.25
    assert torch.allclose(fisher.diagonal(net, images, likelihood=gaussian)["weight"], expected.expand(3, -1))
    drawn = fisher.diagonal(net, images, "sampled", 1000, torch.Generator().manual_seed(0), likelihood=gaussian)
    assert torch.allclose(drawn["weight"], expected.expand(3, -1), rtol=0.1)
    targets = torch.randn(50, 3, dtype=torch.float64)
    residual = ((targets - net(images)) / 0.25).detach()
    empirical = fisher.diagonal(net, (images, targets), "empirical", likelihood=gaussian)
    assert torch.allclose(empirical["weight"], residual.square().T @ images.square() / 50)


# Products and divergences ---------------------------------------------------------------------------------------------------

def dense(net, images, labels, kind):
    """The whole matrix F, and where each parameter sits in it."""
    parameters = list(net.parameters())
    total = 0
    for i in range(len(images)):
        logs = net(images[i:i + 1]).log_softmax(1)[0]
        for c in range(len(logs)) if kind == "exact" else [int(labels[i])]:
            g = torch.cat([v.flatten() for v in torch.autograd.grad(logs[c], parameters, retain_graph=True)])
            total = total + (logs[c].exp().detach() if kind == "exact" else 1.0) * torch.outer(g, g)
    return total / len(images)


def random_direction(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in net.named_parameters()}


def flat(values):
    return torch.cat([v.flatten() for v in values.values()])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("name", ["mlp", "batchnorm", "strided, dilated", "groupnorm", "attention"])
def test_products_equal_those_with_the_whole_matrix(name, kind):
    net, images, labels = build(name)
    matrix, d = dense(net, images, labels, kind), random_direction(net)
    batches = [(images[:2], labels[:2]), (images[2:], labels[2:])]
    assert fisher.quadratic(net, batches, d, kind) == pytest.approx(float(flat(d) @ matrix @ flat(d)), rel=1e-9)
    assert torch.allclose(flat(fisher.vector_product(net, batches, d, kind)), matrix @ flat(d), rtol=1e-8, atol=1e-10)
    assert torch.allclose(flat(fisher.diagonal(net, batches, kind)), matrix.diagonal())


class Shared(nn.Module):
    """A hidden layer that runs twice: called by one name, by two names of one module, or as two modules of one tensor."""

    def __init__(self, names):
        super().__init__()
        self.a, self.out = nn.Linear(4, 4), nn.Linear(4, 3)
        if names == "two of a module":
            self.b = self.a
        elif names == "two of a tensor":
            self.b = nn.Linear(4, 4)
            self.b.weight, self.b.bias = self.a.weight, self.a.bias
        self.double()

    def forward(self, x):
        return self.out(getattr(self, "b", self.a)(torch.tanh(self.a(x))))


def shared(names):
    torch.manual_seed(3)
    return Shared(names), torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))


def assert_as_before(net, places, state):
    assert all(p is place and p.is_leaf for p, place in zip(net.parameters(), places, strict=True))
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


TWO_NAMES = ["two of a module", "two of a tensor"]


@pytest.mark.parametrize("given", ["a", "b"])
@pytest.mark.parametrize("names", TWO_NAMES)
def test_outputs_at_other_values_are_those_of_a_copy_that_holds_them_whatever_the_names_of_a_layer(names, given):
    net, images, _ = shared(names)
    places, state, copied = list(net.parameters()), copy.deepcopy(net.state_dict()), copy.deepcopy(net)
    with torch.no_grad():
        copied.a.weight += 1
    values = {f"{given}.weight": copied.a.weight.detach().clone()}
    assert torch.equal(per_sample.outputs_at(net, values, images), copied(images))
    assert_as_before(net, places, state)


@pytest.mark.parametrize("names", TWO_NAMES)
def test_two_values_for_one_tensor_and_names_that_the_network_lacks_are_refused(names):
    net, images, _ = shared(names)
    with pytest.raises(ValueError, match=r"'b\.weight' is one tensor with another"):
        per_sample.outputs_at(net, {"a.weight": torch.zeros(4, 4), "b.weight": torch.ones(4, 4)}, images)
    with pytest.raises(ValueError, match=r"'c\.weight' is no parameter and no buffer of the network: use one of a\.weight"):
        per_sample.outputs_at(net, {"c.weight": torch.zeros(4, 4)}, images)


@pytest.mark.parametrize("names", TWO_NAMES)
def test_products_of_a_layer_under_two_names_are_those_under_one_and_leave_it_as_it_is(names):
    (net, images, labels), (plain, _, _) = shared(names), shared("one")
    places, state = list(net.parameters()), copy.deepcopy(net.state_dict())
    matrix, d = dense(plain, images, labels, "exact"), random_direction(net)
    assert fisher.quadratic(net, images, d) == pytest.approx(float(flat(d) @ matrix @ flat(d)), rel=1e-9)
    assert_as_before(net, places, state)
    assert torch.allclose(flat(fisher.vector_product(net, images, d)), matrix @ flat(d), rtol=1e-8, atol=1e-10)
    assert_as_before(net, places, state)


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(NoForwardMode.apply(self.a(x)))


def test_products_do_without_forward_mode_where_an_operation_lacks_it():
    torch.manual_seed(0)
    net, images = Custom().double(), torch.randn(4, 3, dtype=torch.float64)
    matrix, d = dense(net, images, None, "exact"), random_direction(net)
    assert fisher.quadratic(net, images, d) == pytest.approx(float(flat(d) @ matrix @ flat(d)), rel=1e-9)
    assert torch.allclose(flat(fisher.vector_product(net, images, d)), matrix @ flat(d))


def moved(net, direction, length):
    other = copy.deepcopy(net)
    for name, p in other.named_parameters():
        p.data.add_(direction[name], alpha=length)
    return other


def test_kl_less_half_the_quadratic_form_falls_with_the_third_power_for_the_exact_kind_only():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    images, labels = torch.randn(40, 6, dtype=torch.float64), torch.randint(4, (40,))
    d = random_direction(net)
    lengths = [2.0**-k for k in range(5, 10)]

    def slope(kind):
        form = fisher.quadratic(net, (images, labels), d, kind)
        rest = [abs(fisher.kl(net, moved(net, d, t), images) - t * t * form / 2) for t in lengths]
        return math.log(rest[0] / rest[-1]) / math.log(lengths[0] / lengths[-1])

    assert slope("exact") == pytest.approx(3, abs=0.2)
    assert slope("empirical") < 2.5


def test_kl_equals_its_definition_and_is_zero_for_equal_networks():
    net, images, _ = build("mlp")
    other = moved(net, random_direction(net), 0.1)
    p, q = net(images).softmax(1), other(images).softmax(1)
    assert fisher.kl(net, other, images) == pytest.approx(float((p * (p / q).log()).sum(1).mean()))
    assert fisher.kl(net, net, images) == 0


# Chance ---------------------------------------------------------------------------------------------------------------------
def test_kl_of_gaussian_predictions_is_that_of_torch():
    torch.manual_seed(0)
    one, other, images = nn.Linear(4, 3).double(), nn.Linear(4, 3).double(), torch.randn(7, 4, dtype=torch.float64)
    p, q = (torch.distributions.Normal(net(images), 0.5) for net in (one, other))
    expected = torch.distributions.kl_divergence(p, q).sum(1).mean()
    assert fisher.kl(one, other, images, fisher.Gaussian(0.5)) == pytest.approx(float(expected))


def test_sampled_converges_to_exact_as_one_over_the_root_of_samples():
    net, images, _ = build("mlp", 8)
    exact, generator = fisher.diagonal(net, images), torch.Generator().manual_seed(0)
    counts = [4, 32, 256]
    errors = [sum(relative_error(fisher.diagonal(net, images, "sampled", n, generator), exact) for _ in range(8))
              for n in counts]
    slope = math.log(errors[-1] / errors[0]) / math.log(counts[-1] / counts[0])
    assert slope == pytest.approx(-0.5, abs=0.12)


def test_one_backward_trace_is_unbiased_and_its_standard_error_is_right():
    net, images, _ = build("lenet", 12)
    exact = fisher.trace(net, images)
    generator = torch.Generator().manual_seed(0)
    batches = [images[:6], images[6:]]
    found = fisher.trace_estimate(net, batches, samples=400, generator=generator)
    assert abs(found.value - exact.value) < 4 * found.standard_error
    assert found.standard_error < 0.2 * exact.value
    for layer, part in found.layers.items():
        assert abs(part.value - exact.layers[layer].value) < 4 * part.standard_error
    repeats = torch.tensor([fisher.trace_estimate(net, batches, 10, generator).value for _ in range(60)])
    claimed = found.standard_error * math.sqrt(400 / 10)
    # between-batch spread of means is part of the claim, so it may only exceed what repeats show
    assert 0.5 * float(repeats.std()) < claimed < 3 * float(repeats.std())


def test_trace_standard_error_is_that_of_a_mean_over_images():
    net, images, labels = build("mlp", 9)
    each = torch.tensor([fisher.trace(net, (images[i:i + 1], labels[i:i + 1]), "empirical").value for i in range(9)])
    found = fisher.trace(net, (images, labels), "empirical")
    assert found.standard_error == pytest.approx(float(each.std()) / 3, rel=1e-5)
    assert math.isnan(fisher.trace(net, images[:1]).standard_error)
    assert math.isnan(fisher.trace_estimate(net, images).standard_error)

@pytest.mark.parametrize("sizes", [[3, 3, 3], [1, 2, 5, 1]])
def test_the_error_of_one_backward_traces_is_that_of_a_mean_weighted_by_images(sizes):
    net, images, _ = build("mlp", 9)
    found = fisher.trace_estimate(net, images.split(sizes), generator=torch.Generator().manual_seed(0))
    generator, n = torch.Generator().manual_seed(0), torch.tensor(sizes, dtype=torch.float64)
    values = torch.tensor([fisher.trace_estimate(net, part, generator=generator).value for part in images.split(sizes)],
                          dtype=torch.float64)
    mean = (n * values).sum() / 9
    error = ((n * (values - mean)).square().sum() / 81 * len(n) / (len(n) - 1)).sqrt()
    assert found.value == pytest.approx(float(mean), rel=1e-9)
    assert found.standard_error == pytest.approx(float(error), rel=1e-6)


def test_the_error_of_traces_that_hardly_differ_is_right_in_single_precision():
    net, images, labels = build("mlp", 40)
    images = images[:1] + 1e-4 * images
    expected = fisher.trace(net, (images, labels))
    found = fisher.trace(net.float(), (images.float(), labels))
    assert expected.standard_error < 1e-4 * expected.value
    assert found.standard_error == pytest.approx(expected.standard_error, rel=0.05)


def test_sampled_repeats_with_its_generator_and_differs_without():
    net, images, _ = build("mlp")
    def drawn(generator=None):
        return flat(fisher.diagonal(net, images, "sampled", generator=generator))

    assert torch.equal(drawn(torch.Generator().manual_seed(1)), drawn(torch.Generator().manual_seed(1)))
    assert any(not torch.equal(drawn(), drawn()) for _ in range(5))


# Refusals and what stays untouched ------------------------------------------------------------------------------------------

class Returns(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(3, 4), function

    def forward(self, x):
        return self.function(self.layer(x))


IMAGES, LABELS = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 0])
REFUSALS = {
    "BatchNorm in training mode .1.": (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), IMAGES, LABELS),
    "BatchNorm in training mode": (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False)), IMAGES, LABELS),
    "Dropout in training mode": (nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 4)), IMAGES, LABELS),
    "NaN": (Returns(lambda z: z / 0), IMAGES, LABELS),
    "out of range": (nn.Linear(3, 3), IMAGES, LABELS),
    "integer type": (nn.Linear(3, 4), IMAGES, LABELS.float()),
    "came with 4 labels": (nn.Linear(3, 4), IMAGES, LABELS[:4]),
    "needs labels": (nn.Linear(3, 4), IMAGES, None),
    "probabilities": (Returns(lambda z: z.softmax(1)), IMAGES, LABELS),
    "one tensor of logits": (Returns(lambda z: (z, z)), IMAGES, LABELS),
    "one tensor of logits for 5": (Returns(lambda z: z.sum()), IMAGES, LABELS),
    "logits .N, classes. with two": (nn.Linear(3, 1), IMAGES, LABELS),
    "logits .N, classes.": (Returns(lambda z: z[:, :, None]), IMAGES, LABELS),
    "no images": (nn.Linear(3, 4), IMAGES[:0], LABELS[:0]),
    "no parameter": (nn.Flatten(), IMAGES, LABELS),
    "max_norm": (nn.Sequential(nn.Embedding(9, 3, max_norm=1.0), nn.Flatten(), nn.Linear(9, 4)),
                 torch.ones(5, 3, dtype=torch.int64), LABELS),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_cannot_be_right_is_refused_by_name_and_leaves_everything_as_it_was(reason):
    net, images, labels = REFUSALS[reason]
    state, flags = copy.deepcopy(net.state_dict()), [p.requires_grad for p in net.parameters()]
    with pytest.raises(ValueError, match=reason):
        fisher.diagonal(net, (images, labels), "empirical")
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert flags == [p.requires_grad for p in net.parameters()]
    assert not any(m._forward_hooks for m in net.modules())


def test_bad_arguments_are_refused_by_name():
    net = nn.Linear(3, 4)
    with pytest.raises(ValueError, match="unknown kind 'true': use one of exact, sampled, empirical"):
        fisher.diagonal(net, IMAGES, "true")
    with pytest.raises(ValueError, match="no images"):
        fisher.diagonal(net, [])
    with pytest.raises(ValueError, match="'wait' is no parameter of the network: use one of weight, bias"):
        fisher.diagonal(net, IMAGES, parameters=["wait"])
    with pytest.raises(ValueError, match="samples=0"):
        fisher.diagonal(net, IMAGES, "sampled", 0)
    with pytest.raises(TypeError, match="pair"):
        fisher.diagonal(net, [3])
    with pytest.raises(ValueError, match="direction of bias has shape"):
        fisher.quadratic(net, IMAGES, {"bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="BatchNorm in training mode"):
        fisher.kl(nn.BatchNorm1d(3), nn.Linear(3, 3), IMAGES)
    with pytest.raises(ValueError, match="std=0"):
        fisher.Gaussian(0)


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.out = inner, nn.Linear(inner.out_features, 3)

    def forward(self, x):
        return self.out(checkpoint(lambda z: torch.tanh(self.inner(z)), x, use_reentrant=False))


@pytest.mark.parametrize("call", [fisher.diagonal, fisher.trace, *[
    lambda net, x, call=call: call(net, x, random_direction(net))
    for call in (fisher.quadratic, fisher.vector_product, fisher.natural_gradient)]])
def test_gradient_checkpointing_is_refused_where_gradients_would_be_wrong(call):
    with pytest.raises(ValueError, match="turn gradient checkpointing off"):
        call(Checkpointed(nn.Linear(4, 4)), torch.randn(5, 4))


def test_hooks_around_the_call_are_no_checkpoints_of_the_network():
    net, images, labels = build("mlp")
    expected = fisher.diagonal(net, (images, labels))
    with torch.autograd.graph.save_on_cpu():
        assert relative_error(fisher.diagonal(net, (images, labels)), expected) == 0


class Moving(nn.Module):
    """Puts a new tensor into the place of a buffer at each pass."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.out(x - self.mean)


CALLS = [
    lambda net, x, y: fisher.diagonal(net, (x, y)),
    lambda net, x, y: fisher.diagonal(net, (x, y), "sampled"),
    lambda net, x, y: fisher.diagonal(net, (x, y), "empirical"),
    lambda net, x, y: fisher.trace(net, (x, y)),
    lambda net, x, y: fisher.trace_estimate(net, (x, y)),
    lambda net, x, y: fisher.quadratic(net, (x, y), random_direction(net)),
    lambda net, x, y: fisher.vector_product(net, (x, y), random_direction(net)),
    lambda net, x, y: fisher.natural_gradient(net, (x, y), random_direction(net), method="kfac"),
    lambda net, x, y: fisher.kl(net, net, x),
]
CHANGING = {
    "instance norm": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, affine=True, track_running_stats=True), nn.Flatten(), nn.Linear(6, 3)),
    "spectral norm": lambda: nn.Sequential(spectral_norm(nn.Linear(6, 5)), nn.ReLU(), nn.Linear(5, 3)),
    "checkpoint": lambda: Checkpointed(spectral_norm(nn.Linear(6, 6))),
    "other tensor": Moving,
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", CHANGING)
def test_buffers_that_change_in_training_stay(name, call):
    torch.manual_seed(0)
    net = CHANGING[name]().train()
    buffers, before = dict(net.named_buffers()), copy.deepcopy(net.state_dict())
    with suppress(ValueError) if name == "checkpoint" else nullcontext():  # most calls refuse it
        call(net, torch.randn(7, 6), torch.randint(3, (7,)))
    assert all(buffer is buffers[key] for key, buffer in net.named_buffers())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_scripted_network_is_one_like_others():
    net, images, labels = CHANGING["instance norm"]().eval(), torch.randn(7, 6), torch.randint(3, (7,))
    scripted = torch.jit.script(net)
    assert fisher.kl(scripted, net, images) == pytest.approx(0, abs=1e-12)
    found = fisher.diagonal(scripted, (images, labels), "empirical")
    assert relative_error(found, fisher.diagonal(net, (images, labels), "empirical")) < 1e-5


def test_every_sample_sees_the_buffers_as_they_were_given():
    torch.manual_seed(0)
    net, images, labels = CHANGING["spectral norm"]().double(), torch.randn(7, 6).double(), torch.randint(3, (7,))
    expected = {name: 0.0 for name, _ in net.named_parameters()}
    for image, label in zip(images, labels, strict=True):
        twin = copy.deepcopy(net)
        F.cross_entropy(twin(image[None]), label[None]).backward()
        expected = {name: expected[name] + p.grad.square() / 7 for name, p in twin.named_parameters()}
    assert relative_error(fisher.diagonal(net, (images, labels), "empirical"), expected) < 1e-12


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["batchnorm", "functional"])
def test_nothing_of_the_caller_changes(name, call):
    net, images, labels = build(name)
    net[0].train() if name == "batchnorm" else net.train()
    images.requires_grad_()
    next(net.parameters()).requires_grad_(False)
    for p in net.parameters():
        p.grad = torch.full_like(p, 0.5)
    before = copy.deepcopy(net.state_dict())
    modes, flags = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    state = torch.get_rng_state()
    call(net, images, labels)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert modes == [m.training for m in net.modules()]
    assert flags == [p.requires_grad for p in net.parameters()]
    assert all(torch.equal(p.grad, torch.full_like(p, 0.5)) for p in net.parameters())
    assert images.grad is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert torch.is_grad_enabled()


class Attention(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.attention, self.out, self.weights = nn.MultiheadAttention(8, 2, 0.5, batch_first=True), nn.Linear(8, 3), weights

    def forward(self, x):
        return self.out(self.attention(x, x, x, need_weights=self.weights)[0].mean(1))


class FusedAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        q = self.query(x)
        return self.out(F.scaled_dot_product_attention(q, q, q, dropout_p=0.5 if self.training else 0.0).mean(1))


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.out = nn.LSTM(8, 6, 2, dropout=0.5, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.layers(x)[0][:, -1])


class Skipping(nn.Module):
    """Stochastic depth."""

    def __init__(self):
        super().__init__()
        self.branch, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = x.mean(1)
        kept = torch.empty(len(x), 1).bernoulli_(0.5) if self.training else 0.5
        return self.out(x + kept * self.branch(x))


RANDOM = {
    "attention": lambda: Attention(True),
    "attention without weights": lambda: Attention(False),
    "fused attention": FusedAttention,
    "LSTM": Deep,
    "RReLU": lambda: nn.Sequential(nn.Flatten(), nn.RReLU(), nn.Linear(40, 3)),
    "stochastic depth": Skipping,
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("call", [
    lambda net, x: fisher.diagonal(net, x),
    lambda net, x: fisher.trace(net, x, "sampled"),
    lambda net, x: fisher.trace_estimate(net, x),
    lambda net, x: fisher.quadratic(net, x, random_direction(net)),
    lambda net, x: fisher.natural_gradient(net, x, random_direction(net), method="kfac"),
    lambda net, x: fisher.kl(net, net, x),
])
@pytest.mark.parametrize("name", RANDOM)
def test_random_predictions_are_refused_and_the_random_state_stays(name, call):
    net, images = RANDOM[name](), torch.randn(6, 5, 8)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"net\.eval"):
        call(net.train(), images)
    assert torch.equal(state, torch.get_rng_state())
    call(net.eval(), images)


def test_labels_may_be_drawn_from_the_global_generator():
    net, images = nn.Linear(8, 3), torch.randn(6, 8)
    state = torch.get_rng_state()
    for call in (fisher.trace_estimate, lambda *args, **options: fisher.trace(*args, "sampled", **options)):
        call(net, images, generator=torch.default_generator)
        assert not torch.equal(state, torch.get_rng_state())


def test_gradients_may_be_switched_off_around_the_call():
    net, images, labels = build("lenet")
    expected = fisher.diagonal(net, (images, labels))
    with torch.no_grad():
        assert relative_error(fisher.diagonal(net, (images, labels)), expected) == 0


# Natural gradients ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_conjugate_gradients_solve_the_damped_system(kind):
    net, images, labels = build("mlp")
    matrix, g = dense(net, images, labels, kind), random_direction(net)
    found = fisher.natural_gradient(net, (images, labels), g, damping=0.1, kind=kind, tolerance=1e-10, iterations=500)
    expected = torch.linalg.solve(matrix + 0.1 * torch.eye(len(matrix), dtype=torch.float64), flat(g))
    assert torch.allclose(flat(found), expected, rtol=1e-6, atol=1e-8)


def test_kronecker_blocks_are_the_matrix_itself_for_one_image_and_a_linear_layer():
    torch.manual_seed(0)
    net, images = nn.Linear(4, 3).double(), torch.randn(1, 4, dtype=torch.float64)
    matrix, g = dense(net, images, None, "exact"), random_direction(net)
    found = fisher.natural_gradient(net, images, g, damping=0.1, method="kfac")
    expected = torch.linalg.solve(matrix + 0.1 * torch.eye(len(matrix), dtype=torch.float64), flat(g))
    assert torch.allclose(flat(found), expected)


def test_a_convolution_over_the_whole_image_has_the_block_of_its_linear_twin():
    torch.manual_seed(0)
    linear, images = nn.Linear(18, 4).double(), torch.randn(6, 2, 3, 3, dtype=torch.float64)
    convolution = nn.Conv2d(2, 4, 3).double()
    convolution.weight.data, convolution.bias.data = linear.weight.data.view(4, 2, 3, 3), linear.bias.data
    g = random_direction(linear)
    one = fisher.natural_gradient(nn.Sequential(nn.Flatten(), linear), images,
                                  {"1.weight": g["weight"], "1.bias": g["bias"]}, method="kfac")
    two = fisher.natural_gradient(nn.Sequential(convolution, nn.Flatten()), images,
                                  {"0.weight": g["weight"].view(4, 2, 3, 3), "0.bias": g["bias"]}, method="kfac")
    assert torch.allclose(flat(one), flat(two))


def test_parameters_without_a_block_take_the_diagonal():
    net, images, labels = build("batchnorm")
    g = random_direction(net)
    f = fisher.diagonal(net, (images, labels))
    found = fisher.natural_gradient(net, (images, labels), g, damping=0.1, method="kfac")
    assert list(found) == list(g)
    assert torch.allclose(found["1.weight"], g["1.weight"] / (f["1.weight"] + 0.1))


def train(net, images, labels, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
    return float(F.cross_entropy(net(images), labels))


def badly_scaled():
    torch.manual_seed(0)
    images = torch.randn(200, 12) * torch.logspace(0, -2, 12)
    labels = (images @ torch.randn(12, 3) / torch.logspace(0, -2, 12).mean()).argmax(1)
    return images, labels, nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))

@pytest.mark.parametrize("bias", [True, False])
def test_factors_of_a_convolution_are_those_of_its_patches_and_of_the_mean_over_its_positions(bias):
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, (2, 3), (2, 1), (1, 0), (1, 2)).double()
    images = torch.randn(4, 2, 5, 7, dtype=torch.float64)
    rule = per_sample.Convolution(images, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation)
    outputs = layer(images)
    g = torch.randn(4, 2, *outputs.shape[1:], dtype=torch.float64)
    a, s, positions = 0, 0, outputs[0, 0].numel()
    for n in range(4):
        for i, j in torch.cartesian_prod(*map(torch.arange, outputs.shape[2:])).tolist():
            patch = torch.autograd.grad(outputs[n, 0, i, j], layer.weight, retain_graph=True)[0][0].flatten()
            patch = torch.cat([patch, patch.new_ones(1)]) if bias else patch
            a = a + torch.outer(patch, patch)
            s = s + sum(torch.outer(g[n, k, :, i, j], g[n, k, :, i, j]) for k in range(2)) / positions
    assert torch.allclose(natural_gradient.input_moment(rule, bias), a)
    assert torch.allclose(natural_gradient.gradient_moment(rule, g), s)


@pytest.mark.parametrize("max_kl", [None, 1e-4])
def test_steps_of_natural_gradient_are_those_of_their_moving_factors(max_kl):
    torch.manual_seed(0)
    net, images, labels = nn.Linear(4, 3).double(), torch.randn(20, 4, dtype=torch.float64), torch.randint(3, (20,))
    optimizer = fisher.NaturalGradient(net, 0.2, 0.1, momentum=0.5, decay=0.8, every=1, weight_decay=0.3, max_kl=max_kl,
                                       generator=torch.Generator().manual_seed(1))
    generator, rows = torch.Generator().manual_seed(1), torch.cat([images, torch.ones(20, 1, dtype=torch.float64)], 1)
    a, s, m = rows.T @ rows / 20, None, torch.zeros(3, 5, dtype=torch.float64)
    for _ in range(3):
        w = torch.cat([net.weight, net.bias[:, None]], 1).detach()
        drawn = fisher.SOFTMAX.sampled(rows @ w.T, 1, generator)[:, 0]
        net.eval()
        net(images)  # in evaluation no factor changes
        net.train()
        new = drawn.T @ drawn / 20
        s = new if s is None else 0.8 * s + 0.2 * new
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
        g = torch.cat([net.weight.grad, net.bias.grad[:, None]], 1)
        d = torch.linalg.solve(torch.kron(s, a) + 0.1 * torch.eye(15, dtype=torch.float64), g.flatten()).view(3, 5)
        change = 0.5 * (0.2 / 0.5) ** 2 * (d * g).sum()
        m = 0.5 * m + d * (1 if max_kl is None else min(1, (max_kl / change) ** 0.5))
        expected = w * (1 - 0.2 * 0.3) - 0.2 * m
        assert torch.allclose(torch.cat([net.weight, net.bias[:, None]], 1), expected)


def test_factors_are_updated_on_every_so_many_passes_of_training():
    images, labels, net = badly_scaled()
    optimizer, updates = fisher.NaturalGradient(net, every=3), []
    for _ in range(7):
        before = {key: block.s.clone() for key, block in optimizer.blocks.items()}
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
        updates.append(not all(key in before and torch.equal(block.s, before[key]) for key, block in optimizer.blocks.items()))
    assert updates == [True, False, False, True, False, False, True]


def test_natural_gradient_descends_faster_than_plain_on_badly_scaled_inputs():
    images, labels, net = badly_scaled()
    plain = copy.deepcopy(net)
    slow = train(plain, images, labels, torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9), 60)
    optimizer = fisher.NaturalGradient(net, lr=0.1, damping=1e-3, generator=torch.Generator().manual_seed(0))
    fast = train(net, images, labels, optimizer, 60)
    assert fast < slow


def test_natural_gradient_trains_convolutions_with_batchnorm_and_shared_layers():
    torch.manual_seed(0)
    shared = nn.Conv2d(4, 4, 3, padding=1)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), shared, nn.ReLU(),
                        shared, nn.Flatten(), nn.Linear(100, 2))
    images = torch.randn(40, 1, 5, 5)
    labels = (images.mean((1, 2, 3)) > 0).long()
    start = float(F.cross_entropy(net(images), labels))
    optimizer = fisher.NaturalGradient(net, lr=0.05, every=2, generator=torch.Generator().manual_seed(0))
    train(net, images, labels, optimizer, 40)
    assert float(F.cross_entropy(net(images), labels)) < start
    assert id(shared.weight) not in optimizer.blocks
    assert id(shared.weight) in optimizer.squares


def test_a_network_that_is_a_single_layer_gets_its_block():
    images, labels, _ = badly_scaled()
    net = nn.Linear(12, 3)
    optimizer = fisher.NaturalGradient(net)
    train(net, images, labels, optimizer, 1)
    (block,) = optimizer.blocks.values()
    rows = torch.cat([images, torch.ones(len(images), 1)], 1)
    assert torch.allclose(block.a, rows.T @ rows / len(images), atol=1e-5)


@pytest.mark.parametrize("role", ["weight", "bias"])
def test_a_parametrized_layer_takes_the_diagonal(role):
    images, labels, net = badly_scaled()
    parametrize.register_parametrization(net[0], role, nn.Identity())
    optimizer = fisher.NaturalGradient(net, every=1, max_kl=None)
    train(net, images, labels, optimizer, 10)
    assert list(optimizer.blocks) == [id(net[2].weight)]
    layer = list(net[0].parameters())
    assert set(optimizer.squares) == {id(p) for p in layer}
    directions = optimizer._directions(layer, 0.1)
    assert all(torch.equal(directions[id(p)], p.grad / (optimizer.squares[id(p)] + 0.1)) for p in layer)


def test_passes_at_other_weights_are_no_passes_of_training():
    images, labels, net = badly_scaled()
    optimizer = fisher.NaturalGradient(net, every=1, generator=torch.Generator().manual_seed(0))
    train(net, images, labels, optimizer, 2)
    passes, before = optimizer.passes, {key: (block.a.clone(), block.s.clone()) for key, block in optimizer.blocks.items()}
    for names in (["0.weight"], ["0.weight", "0.bias", "2.weight", "2.bias"]):
        for moved in (lambda p: p + 0.1, lambda p: p.detach() + 0.1):
            per_sample.outputs_at(net, {name: moved(net.get_parameter(name)) for name in names}, images)
    assert optimizer.passes == passes
    assert optimizer.blocks.keys() == before.keys()
    for key, block in optimizer.blocks.items():
        assert torch.equal(block.a, before[key][0])
        assert torch.equal(block.s, before[key][1])
    net.append(nn.Linear(3, 3))(images)  # a layer that another optimizer may train
    assert optimizer.passes == passes + 1


def test_hooks_of_the_optimizer_are_empty_in_copies_and_vanish_with_it():
    images, labels, net = badly_scaled()
    optimizer = fisher.NaturalGradient(net)
    train(net, images, labels, optimizer, 2)
    passes = optimizer.passes
    twin = copy.deepcopy(net)
    twin(images)
    assert optimizer.passes == passes
    optimizer.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    optimizer = fisher.NaturalGradient(net)
    assert any(m._forward_hooks for m in net.modules())
    del optimizer
    gc.collect()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_network_under_natural_gradient_can_be_saved(tmp_path):
    images, _, net = badly_scaled()
    optimizer = fisher.NaturalGradient(net)
    torch.save(net, tmp_path / "net.pt")
    loaded = torch.load(tmp_path / "net.pt", weights_only=False)
    assert torch.equal(loaded(images), net(images))
    assert optimizer.passes == 1


# Adam -----------------------------------------------------------------------------------------------------------------------

def test_from_adam_is_the_empirical_diagonal_for_batches_of_one_image():
    torch.manual_seed(0)
    net, images, labels = nn.Linear(4, 3).double(), torch.randn(300, 4, dtype=torch.float64), torch.randint(3, (300,))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-12, betas=(0.9, 1 - 1e-9))
    for image, label in zip(images, labels, strict=True):
        optimizer.zero_grad()
        F.cross_entropy(net(image[None]), label[None]).backward()
        optimizer.step()
    expected = fisher.diagonal(net, (images, labels), "empirical")
    assert relative_error(fisher.from_adam(optimizer, 1, net), expected) < 1e-6
    assert list(fisher.from_adam(optimizer, 1)) == [0, 1]
    named = torch.optim.Adam(net.named_parameters())
    named.step()
    assert list(fisher.from_adam(named, 8)) == ["weight", "bias"]

def test_from_adam_is_the_batch_size_times_the_squared_gradient_of_a_first_batch():
    torch.manual_seed(0)
    net = nn.Linear(4, 3).double()
    optimizer = torch.optim.Adam(net.parameters())
    F.cross_entropy(net(torch.randn(8, 4, dtype=torch.float64)), torch.randint(3, (8,))).backward()
    optimizer.step()
    expected = {name: 8 * p.grad.square() for name, p in net.named_parameters()}
    assert relative_error(fisher.from_adam(optimizer, 8, net), expected) < 1e-9


def test_from_adam_refuses_an_optimizer_without_second_moments():
    net = nn.Linear(2, 2)
    for optimizer in (torch.optim.SGD(net.parameters(), lr=0.1), torch.optim.Adam(net.parameters())):
        with pytest.raises(ValueError, match="pass an Adam that has taken a step"):
            fisher.from_adam(optimizer, 8)

def test_from_adam_counts_positions_also_over_parameters_without_a_gradient():
    first, second, third = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = torch.optim.Adam([{"params": [first, second]}, {"params": [third]}])
    third.square().sum().backward()
    optimizer.step()
    assert list(fisher.from_adam(optimizer, 1)) == [2]


def test_examples_in_docstrings_hold():
    import doctest

    assert doctest.testmod(fisher).failed == 0


def test_divergences_far_below_single_precision_are_right():
    torch.manual_seed(0)
    net, images = nn.Linear(5, 3), torch.randn(100, 5)
    near = copy.deepcopy(net)
    with torch.no_grad():
        near.weight += 1e-5 * torch.randn(3, 5)
    batches = [(images, torch.zeros(100, dtype=torch.long))]
    exact = fisher.kl(copy.deepcopy(net).double(), copy.deepcopy(near).double(), [(images.double(), batches[0][1])])
    assert fisher.kl(net, near, batches) == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("kind", ["empirical", "exact"])
def test_layers_that_vmap_gets_wrong_only_for_several_images_go_through_the_loop(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.PReLU(), nn.Linear(5, 3)).double()
    images, labels = torch.randn(9, 6, dtype=torch.float64), torch.randint(3, (9,))
    found = fisher.diagonal(net, [(images, labels)], kind=kind)
    for name, expected in loop_diagonal(net, images, labels, kind).items():
        assert torch.allclose(found[name], expected)


def test_factors_of_kfac_have_the_precision_of_the_weights_under_bfloat16():
    torch.manual_seed(0)
    net, images = nn.Sequential(nn.Linear(6, 3)).train(), torch.randn(20, 6)
    optimizer = fisher.NaturalGradient(net, every=1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(net(images), torch.randint(3, (20,)))
    loss.backward()
    optimizer.step()
    block, = optimizer.blocks.values()
    assert {block.a.dtype, block.s.dtype} == {torch.float32}
