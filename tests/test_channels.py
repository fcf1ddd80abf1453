"""Statistics, relations and removal of channels, against loops and against the masked network."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy
from torch import nn

from fishlib import channels, cost, divergence, nets
from fishlib.data import ImageData

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def data():
    return ImageData("digits", device="cpu", limit=300)


def with_statistics(net, seed=0):
    """`net` in evaluation mode whose BatchNorms have statistics and weights that are not those of a new network."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.weight, 0.5), (module.bias, 0.4), (module.running_mean, -0.2),
                                (module.running_var, 0.1)):
                tensor.data.copy_(low + torch.rand(tensor.shape, generator=generator))
    return net.eval()


@pytest.fixture
def net():
    torch.manual_seed(0)
    return with_statistics(nets.small_cnn(10, SHAPE, 8))


@pytest.fixture(params=["small_cnn", "vgg", "resnet", "densenet"])
def any_net(request):
    torch.manual_seed(0)
    return with_statistics({"small_cnn": lambda: nets.small_cnn(10, SHAPE, 8), "vgg": lambda: nets.vgg(11, 10, 1, 4),
                            "resnet": lambda: nets.resnet(8, 10, 1, 4), "densenet": lambda: nets.densenet(10, 4, channels=1)}[
                                request.param]())


def maps_of(net, images, depth):
    with torch.no_grad():
        return net[:depth](images)


def state(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}, net.training


# Statistics.


@pytest.mark.parametrize("reduce", channels.REDUCE)
def test_streamed_moments_are_those_of_all_activations_at_once(net, data, reduce):
    net = net.double()
    images = data.split("train")[0].double()

    class Double:
        def batches(self, *args, **kwargs):
            return data.batches(*args, **kwargs)

    net.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    found = channels.activations(net, Double(), reduce=reduce, images=10_000, batch_size=37)
    maps = maps_of(net, images, 7)
    rows = (maps.mean((2, 3), keepdim=True) if reduce == "mean" else maps).movedim(1, 0).flatten(1)
    layer = found.layers["4"]
    assert layer.samples == rows.shape[1]
    torch.testing.assert_close(layer.mean, rows.mean(1))
    torch.testing.assert_close(layer.covariance, torch.cov(rows, correction=0))
    correlation = np.corrcoef(rows.numpy())
    np.testing.assert_allclose(found.relation("4", "correlation"), correlation, atol=1e-9)
    assert layer.histogram.sum(1).tolist() == [rows.shape[1]] * len(rows)
    np.testing.assert_array_equal(layer.histogram[:, 0], (rows == 0).sum(1))


def test_correlation_of_neighbours_is_that_of_pooled_maps(net, data):
    images = data.split("train")[0]
    found = channels.activations(net, data, images=10_000, batch_size=50)
    first, second = maps_of(net, images, 3), maps_of(net, images, 7)
    first = nn.functional.adaptive_avg_pool2d(first, second.shape[2:])
    rows = torch.cat([first, second], 1).movedim(1, 0).flatten(1).double().numpy()
    np.testing.assert_allclose(found.between("0", "4", "correlation"), np.corrcoef(rows)[:8, 8:], atol=1e-5)
    assert found.between("0", "4", "kl").shape == (8, 16)


def test_correlation_of_neighbours_is_exact_where_channels_vary_by_far_less_than_their_mean(data):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1), nn.ReLU(),
                        nn.Flatten(), nn.Linear(256, 10)).eval()
    with torch.no_grad():
        net[0].weight.mul_(1e-3)
        net[0].bias.fill_(1)
        net[2].bias.fill_(1)
    images = data.split("train")[0]
    found = channels.activations(net, data, images=10_000, batch_size=50).between("0", "2", "correlation")
    rows = torch.cat([maps_of(net, images, 2), maps_of(net, images, 4)], 1).double().movedim(1, 0).flatten(1).numpy()
    np.testing.assert_allclose(found, np.corrcoef(rows)[:8, 8:], atol=1e-6)


def test_cka_of_one_batch_is_that_of_pairs_of_maps(net, data):
    images = data.split("train")[0]
    found = channels.activations(net, data, grams=True, images=10_000, batch_size=10_000).relation("0", "cka")
    maps = maps_of(net, images, 3)
    for i, j in ((0, 1), (2, 7), (3, 3)):
        expected = divergence.linear_cka(maps[:, i].flatten(1).double(), maps[:, j].flatten(1).double())
        assert float(found[i, j]) == pytest.approx(float(expected), abs=1e-5)


def test_relations_of_adjacent_layers_are_those_of_pairs_of_maps(net, data):
    images = data.split("train")[0]
    options = {"images": 10_000, "batch_size": 10_000, "adjacent": True}
    first, second = (maps_of(net, images, depth).double() for depth in (3, 7))
    cka = channels.relations(net, data, "cka", **options)["0", "4"]
    cosine = channels.relations(net, data, "cosine", **options)["0", "4"]
    pooled = nn.functional.adaptive_avg_pool2d(first, second.shape[2:])
    for i, j in ((0, 1), (2, 7), (5, 15)):
        x, y = first[:, i].flatten(1), second[:, j].flatten(1)
        assert float(cka[i, j]) == pytest.approx(float(divergence.linear_cka(x, y)), abs=1e-5)
        expected = nn.functional.cosine_similarity(pooled[:, i].flatten(), second[:, j].flatten(), 0)
        assert float(cosine[i, j]) == pytest.approx(float(expected), abs=1e-5)
    for kind in channels.KINDS:
        assert set(channels.relations(net, data, kind, images=60, adjacent=True)) == {"0", "4", ("0", "4")}
        assert set(channels.relations(net, data, kind, images=60)) == {"0", "4"}


@pytest.mark.parametrize("kind", channels.KINDS)
def test_dead_channels_leave_relations_of_adjacent_layers_finite(net, data, kind):
    net[1].weight.data[3], net[1].bias.data[3] = 0, -1
    net[5].weight.data[2], net[5].bias.data[2] = 0, 0.7
    matrix = channels.relations(net, data, kind, images=100, adjacent=True)["0", "4"]
    assert torch.isfinite(matrix).all()
    if kind in ("correlation", "cka"):
        assert matrix[3].abs().max() == 0
        assert matrix[:, 2].abs().max() == 0


def test_kl_of_all_pairs_is_that_of_loops_over_pairs(net, data):
    found = channels.activations(net, data, images=100)
    histogram = found.layers["0"].histogram.double().numpy() + 0.5
    expected = [[entropy(p, q) for q in histogram] for p in histogram]
    np.testing.assert_allclose(found.relation("0", "kl"), expected, atol=1e-12)
    assert torch.equal(channels.relations(net, data, "kl", images=100)["0"], found.relation("0", "kl"))


@pytest.mark.parametrize("kind", channels.KINDS)
def test_dead_channels_are_reported_and_leave_every_relation_finite(net, data, kind):
    net[1].weight.data[3], net[1].bias.data[3] = 0, -1
    net[1].weight.data[5], net[1].bias.data[5] = 0, 0.7
    found = channels.activations(net, data, images=100, grams=True)
    assert found.dead()["0"] == [3]
    assert found.layers["0"].constant == [3, 5]
    matrix = found.relation("0", kind)
    assert torch.isfinite(matrix).all()
    if kind in ("correlation", "cka"):
        assert matrix[3, [0, 1, 2, 4]].abs().max() == 0
    assert set(channels.redundant(matrix, kind, 2, [3, 5])) == {3, 5}


class DefinedOutOfOrder(nn.Module):
    """As many tutorials write it: all convolutions first."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.bn1, self.bn2, self.fc = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.relu(self.bn2(self.conv2(x))).mean((2, 3)))


def test_maps_are_those_behind_the_batchnorm_that_reads_them_in_whatever_order_layers_are_defined(data):
    torch.manual_seed(0)
    net = with_statistics(DefinedOutOfOrder())
    nn.init.constant_(net.bn2.bias, 3.0)
    net.bn2.weight.data[4], net.bn2.bias.data[4] = 0, -1
    found = channels.activations(net, data, images=10_000)
    with torch.no_grad():
        first = torch.relu(net.bn1(net.conv1(data.split("train")[0])))
        second = torch.relu(net.bn2(net.conv2(first)))
    for name, maps in (("conv1", first), ("conv2", second)):
        torch.testing.assert_close(found.layers[name].mean, maps.mean((0, 2, 3)).double(), rtol=1e-4, atol=1e-5)
    assert found.dead() == {"conv2": [4]}


class Shared(nn.Module):
    """One BatchNorm for two convolutions, and a convolution that is read beside its BatchNorm."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1)
        self.both, self.own, self.fc = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Linear(4, 10)

    def forward(self, x):
        given = self.c(self.both(self.a(x)) + self.both(self.b(x)))
        return self.fc((given + torch.relu(self.own(given))).mean((2, 3)))


def test_a_batchnorm_that_stands_for_more_than_one_convolution_or_for_a_part_of_one_is_not_taken(data):
    torch.manual_seed(0)
    net = with_statistics(Shared())
    net.own.weight.data[1], net.own.bias.data[1] = 0, -1
    found = channels.activations(net, data, images=10_000, rectify=None)
    maps = net.a(data.split("train")[0]).detach()
    torch.testing.assert_close(found.layers["a"].mean, maps.mean((0, 2, 3)).double(), rtol=1e-4, atol=1e-5)
    assert found.dead() == {}


@pytest.mark.parametrize("relu", [nn.ReLU(), nn.ReLU(inplace=True), nn.Identity(), nn.MaxPool2d(1)])
def test_a_channel_that_is_negative_throughout_is_dead_only_where_a_relu_follows(data, relu):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), relu, nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10)).eval()
    net[0].bias.data[2] = -5
    for rectify in (True, False, None):
        found = channels.activations(net, data, images=100, rectify=rectify)
        assert found.dead() == ({"0": [2]} if isinstance(relu, nn.ReLU) else {})
    chosen = channels.choose(net, data, "correlation", 0.125, ["0"], images=100)
    raw = channels.activations(net, data, ["0"], images=100, rectify=False)
    if not isinstance(relu, nn.ReLU):
        assert chosen["0"] == channels.redundant(raw.relation("0", "correlation"), "correlation", 1)
        assert channels.activations(net, data, ["0"], images=100).layers["0"].constant == [2]
    else:
        assert chosen["0"] == [2]


def test_channels_that_are_added_to_a_residual_stream_are_not_dead_for_being_negative(data):
    torch.manual_seed(0)
    net = with_statistics(nets.resnet(8, 10, 1, 4))
    net.units[0].bn2.bias.data[3] = net.units[1].bn1.bias.data[3] = -50
    dead = channels.activations(net, data, images=50).dead()
    assert "steps.0.conv2" not in dead
    assert 3 in dead["steps.1.conv1"]


def test_histograms_of_layers_with_and_without_a_relu_are_not_compared(data):
    found = channels.activations(with_statistics(nets.resnet(8, 10, 1, 4)), data, images=20, rectify=None)
    assert found.between("conv", "steps.0.conv1", "kl").shape == (4, 4)
    with pytest.raises(ValueError, match=r"steps.0.conv1 and steps.0.conv2 have other bins, .*rectify=True"):
        found.between("steps.0.conv1", "steps.0.conv2", "kl")


def test_a_channel_that_is_constant_but_not_zero_is_not_dead(net, data):
    net[1].weight.data[3], net[1].bias.data[3] = 0, 5
    found = channels.activations(net, data, images=50, grams=True)
    assert "0" not in found.dead()
    assert found.layers["0"].constant == [3]
    for kind in channels.KINDS:
        assert 3 not in channels.choose(net, data, kind, 0.13, ["0"], images=50)["0"]


def test_nothing_of_the_callers_network_changes(net, data):
    net.train()
    net[0].weight.requires_grad_(False)
    before, training = state(net)
    random = torch.get_rng_state()
    for criterion in channels.CRITERIA:
        channels.remove(net, SHAPE, channels.choose(net, data, criterion, 0.5, images=60))
    channels.contribution(net, data, images=30, by="kl")
    channels.allocate(net, SHAPE, {"0": 1.0, "4": 2.0})
    after, still = state(net)
    assert training == still
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not net[0].weight.requires_grad
    assert net[4].weight.requires_grad
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize(("call", "message"), [
    (lambda net, data: channels.activations(net, data, ["nowhere"]), "no convolution named nowhere: it has 0, 4"),
    (lambda net, data: channels.activations(net, data, images=1), "statistics need two or more"),
    (lambda net, data: channels.activations(net, data, grams=True, batch_size=1), "batch_size=1"),
    (lambda net, data: channels.activations(nets.mlp(), data), "has no nn.Conv2d"),
    (lambda net, data: channels.relations(net, data, "chi2"), "use one of kl"),
    (lambda net, data: channels.activations(net, data, images=20).relation("0", "cka"), "call activations"),
    (lambda net, data: channels.activations(net, data, images=20).relation("zz"), "unknown layer 'zz': use one of 0, 4"),
    (lambda net, data: channels.activations(net, data, images=20).between("0", "zz"), "unknown layer 'zz'"),
    (lambda net, data: channels.contribution(net, data, portions=-1), "portions=-1"),
    (lambda net, data: channels.contribution(nets.mlp(), data), "has no nn.Conv2d"),
    (lambda net, data: channels.contribution(net, data, by="rank"), "unknown by 'rank': use one of l1, kl"),
    (lambda net, data: channels.scores(net, data, "foo"), "use one of l1, fpgm, taylor, rank, chip, group, random"),
    (lambda net, data: channels.choose(net, data, share=1.0), "below 1"),
    (lambda net, data: channels.choose(net, data, share={"0": 0.5, "4": 1.0}), "share=1.0: use a share from 0 to below 1"),
    (lambda net, data: channels.choose(net, data, share={"0": 0.5}, layers=["0", "4"]), "no share for layer 4"),
    (lambda net, data: channels.allocate(net, SHAPE, {"0": 1, "4": 2}, share=1.0), "share=1.0"),
    (lambda net, data: channels.allocate(net, SHAPE, {"0": 1, "4": 2}, tilt=1.0), "tilt=1.0: use a number above -1"),
    (lambda net, data: channels.allocate(net, SHAPE, {"0": 1}), "no contribution of layer 4"),
    (lambda net, data: channels.allocate(net, SHAPE, {"0": 1, "4": float("nan")}), "contributions are not finite"),
    (lambda net, data: channels.allocate(nets.relation_net("attention"), SHAPE, {}), "no convolution of Sequential can lose"),
    (lambda net, data: channels.choose(nets.relation_net("attention"), data), "no convolution of Sequential can lose channels"),
])
def test_bad_input_is_named(net, data, call, message):
    with pytest.raises(ValueError, match=message):
        call(net, data)


@pytest.mark.parametrize("criterion", [one for one in channels.CRITERIA if one != "random"])
def test_weights_that_are_not_numbers_are_named_by_every_criterion(net, data, criterion):
    net[4].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layer 4: .* not finite"):
        channels.choose(net, data, criterion, layers=["4"], images=20)
    assert not net[1]._forward_hooks


def test_a_head_that_is_not_a_number_is_named(net, data):
    net[-1].bias.data[0] = float("nan")
    for call in (lambda: channels.contribution(net, data, images=20), lambda: channels.remove(net, SHAPE, {"0": [1]}),
                 lambda: channels.plan(net, SHAPE, {"0": [1]})):
        with pytest.raises(ValueError, match="outputs of the network are not finite"):
            call()
    assert channels.removable(net, SHAPE) == ["0", "4"]


def test_minus_infinity_is_not_taken_for_a_dead_channel(net, data):
    net[5].bias.data[3] = -float("inf")
    with pytest.raises(ValueError, match="layer 4: activations are not finite"):
        channels.activations(net, data, images=20)


class WithUnusedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.unused = with_statistics(nets.small_cnn(10, SHAPE, 8)), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("criterion", channels.CRITERIA)
def test_convolutions_that_do_not_run_are_left_out(data, criterion):
    net = WithUnusedHead()
    assert channels.removable(net, SHAPE) == ["net.0", "net.4"]
    assert list(channels.choose(net, data, criterion, images=20)) == ["net.0", "net.4"]


@pytest.mark.parametrize("call", [
    lambda net, data: channels.relations(net, data, layers=["unused"], images=20),
    lambda net, data: channels.scores(net, data, "taylor", ["unused"], images=20),
    lambda net, data: channels.scores(net, data, "rank", ["unused"], images=20),
    lambda net, data: channels.scores(net, data, "chip", ["unused"], images=20),
    lambda net, data: channels.scores(net, data, "group", ["unused"]),
    lambda net, data: channels.remove(net, SHAPE, {"unused": [0]})])
def test_a_layer_that_was_asked_for_and_does_not_run_is_named(data, call):
    with pytest.raises(ValueError, match="layer unused"):
        call(WithUnusedHead(), data)


# Contribution.


def test_contribution_is_the_kl_of_predictions_with_and_without(net, data):
    table = channels.contribution(net, data, portions=2, images=20).set_index(["layer", "portion"])
    assert len(table) == 6
    images, _ = data.split("validation")
    chosen = torch.linspace(0, len(images) - 1, 20, dtype=torch.float64).round().long()
    muted = copy.deepcopy(net)
    weak = net[4].weight.abs().sum((1, 2, 3)).argsort()[:8]
    muted[5].weight.data[weak], muted[5].bias.data[weak] = 0, 0
    with torch.no_grad():
        p, q = (one(images[chosen]).softmax(1).double().numpy() for one in (net, muted))
    assert table.loc[("4", 0), "kl"] == pytest.approx(np.mean([entropy(a, b) for a, b in zip(p, q, strict=True)]), rel=1e-4)
    assert table.kl.is_monotonic_increasing


def test_portions_by_kl_are_those_that_redundancy_removes_one_after_the_other(net, data):
    net[5].weight.data[3], net[5].bias.data[3] = 0, -1
    images, _ = data.split("validation")
    chosen = torch.linspace(0, len(images) - 1, 20, dtype=torch.float64).round().long()
    statistics = channels.activations(net, data, images=20).layers["4"]
    assert statistics.dead == [3]
    relation = channels.activations(net, data, images=20).relation("4", "kl")
    first, second = (set(channels.redundant(relation, "kl", count, [3])) for count in (4, 8))
    assert 3 in first
    assert first < second  # otherwise what follows does not hold
    table = channels.contribution(net, data, images=20, by="kl").set_index(["layer", "portion"])
    for portion, part in enumerate((first, second - first)):
        muted = copy.deepcopy(net)
        muted[5].weight.data[list(part)], muted[5].bias.data[list(part)] = 0, 0
        with torch.no_grad():
            p, q = (one(images[chosen]).softmax(1).double().numpy() for one in (net, muted))
        assert table.loc[("4", portion), "kl"] == pytest.approx(np.mean([entropy(a, b) for a, b in zip(p, q, strict=True)]),
                                                                rel=1e-4)
        assert table.loc[("4", portion), "channels"] == 4


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(0, 8), st.integers(0, 1000))
def test_portions_by_kl_hold_every_channel_once(size, portions, seed):
    matrix = torch.rand(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert sorted(channels._removal_order(matrix, [0], portions)) == list(range(size))


def test_input_divergence_is_that_between_the_histograms_of_all_values(net, data):
    table = channels.contribution(net, data, portions=2, images=10_000).set_index(["layer", "portion"])
    images, shares = data.split("train")[0], []
    edges = np.concatenate([[-np.inf], np.linspace(0, channels.RANGE, 63), [np.inf]])
    first = next(iter(data.batches("train", 100, shuffle=False)))[0]
    for depth in (3, 7):
        maps, scale = maps_of(net, images, depth).double(), maps_of(net, first, depth).double().square().mean().sqrt()
        counts = pd.cut(pd.Series((maps / scale).flatten().numpy()), edges).value_counts(sort=False).to_numpy() + 0.5
        shares.append(counts / counts.sum())
    assert table.loc[("4", -1), "kl_input"] == pytest.approx(entropy(shares[1], shares[0]), rel=1e-3)
    assert table.kl_input.notna().sum() == 1


# Choice.


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(0, 1000), st.sampled_from(channels.KINDS), st.data())
def test_redundant_names_as_many_channels_as_asked(size, seed, kind, draw):
    count = draw.draw(st.integers(0, size - 1))
    matrix = torch.rand(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    chosen = channels.redundant(matrix, kind, count)
    assert len(set(chosen)) == count
    assert set(chosen) <= set(range(size))

def test_divergences_count_both_ways_and_correlations_by_magnitude():
    divergences = torch.tensor([[0, 0.1, 1.0], [9, 0, 1.5], [1, 1.5, 0]], dtype=torch.float64)
    assert channels.redundant(divergences, "kl", 1) == channels.redundant(divergences.T, "kl", 1) == [2]
    correlations = torch.tensor([[1, -0.9, 0.5], [-0.9, 1, 0.0], [0.5, 0, 1]], dtype=torch.float64)
    assert channels.redundant(correlations, "correlation", 1) == [1]
    assert channels.redundant(correlations, "cosine", 1) == [2]


def test_clusters_are_those_of_average_linkage():
    # By single linkage the first four would be one cluster, since each is near to the next.
    places = torch.tensor([0.0, 1.0, 2.05, 3.15, 4.3], dtype=torch.float64)
    assert channels.redundant((places[:, None] - places[None, :]).abs(), "kl", 3) == [1, 2, 4]


def test_a_copied_channel_is_the_redundant_one(net, data):
    net[0].weight.data[6] = net[0].weight.data[2]
    for tensor in (net[1].weight, net[1].bias, net[1].running_mean, net[1].running_var):
        tensor.data[6] = tensor.data[2]
    for kind in channels.KINDS:
        (gone,) = channels.redundant(channels.relations(net, data, kind, images=60)["0"], kind, 1)
        assert gone in (2, 6)


def test_taylor_is_the_squared_product_of_maps_and_gradients(net, data):
    found = channels.scores(net, data, "taylor", ["0"], images=15)["0"]
    batches = data.batches("train", shuffle=False)
    chosen = torch.linspace(0, len(batches.labels) - 1, 15, dtype=torch.float64).round().long()
    images, labels = (part[chosen] for part in data.split("train"))
    expected = 0
    for image, label in zip(images, labels, strict=True):
        maps = net[:2](image[None]).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(net[2:](maps), label[None]), maps)
        expected = expected + (maps * gradient).sum((0, 2, 3)).detach().double().square() / 15
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)

def test_a_random_choice_is_that_of_its_seed(net, data):
    first, again, other = (channels.choose(net, data, "random", 0.5, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_fpgm_and_rank_are_what_they_are_named_for(net, data):
    filters = net[0].weight.detach().flatten(1)
    expected = torch.stack([sum((a - b).norm() for b in filters) for a in filters])
    torch.testing.assert_close(channels.scores(net, data, "fpgm", ["0"])["0"], expected)
    images = data.split("train")[0]
    ranks = np.linalg.matrix_rank(maps_of(net, images, 3).numpy()).mean(0)
    np.testing.assert_allclose(channels.scores(net, data, "rank", ["0"], images=10_000)["0"], ranks, atol=0.02)


def nuclear_norms_by_loops(maps):
    """By how much the sum of singular values of an image's maps (C, P) falls without each channel."""
    fall = []
    for one in range(len(maps)):
        without = maps.clone()
        without[one] = 0
        fall.append(torch.linalg.svdvals(maps).sum() - torch.linalg.svdvals(without).sum())
    return torch.stack(fall)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000), st.sampled_from([1e-6, 1.0, 1e6]),
       st.sampled_from(["plain", "dead", "twins", "nothing", "small"]))
def test_independence_is_the_fall_of_the_nuclear_norm(channels_, pixels, seed, unit, case):
    maps = unit * torch.rand(2, channels_, pixels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if case == "twins":
        maps[:, -1] = maps[:, 0]
    maps[:, 0] *= {"dead": 0, "small": 1e-4}.get(case, 1)
    maps *= case != "nothing"
    found = channels.independence(maps)
    expected = torch.stack([nuclear_norms_by_loops(one) for one in maps])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * unit)
    assert (found >= 0).all()


def test_chip_is_the_mean_independence_over_images_behind_the_relu(net, data):
    images = data.split("train")[0]
    chosen = torch.linspace(0, len(images) - 1, 12, dtype=torch.float64).round().long()
    for layer, depth in (("0", 3), ("4", 7)):
        maps = maps_of(net, images[chosen], depth).double().flatten(2)
        expected = torch.stack([nuclear_norms_by_loops(one) for one in maps]).mean(0)
        found = channels.scores(net, data, "chip", [layer], images=12)[layer]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    many = [channels.scores(net, data, "chip", ["0"], images=count)["0"] for count in (channels.CHIP_IMAGES, 10_000)]
    assert torch.equal(*many)


def test_l1_is_the_sum_of_magnitudes_of_a_filter(net, data):
    expected = [sum(abs(w) for w in one.flatten().tolist()) for one in net[4].weight]
    assert channels.scores(net, data, "l1")["4"].tolist() == pytest.approx(expected)
    chosen = channels.choose(net, data, "l1", 0.25, ["4"])
    assert chosen["4"] == sorted(np.argsort(expected)[:4].tolist())


def test_group_is_the_sum_of_squares_of_all_weights_that_go_together(net, data):
    found = channels.scores(net, data, "group", ["0"])["0"]
    expected = torch.stack([net[0].weight[c].square().sum() + net[1].weight[c].square() + net[4].weight[:, c].square().sum()
                            for c in range(8)]).detach()
    torch.testing.assert_close(found, expected / expected.mean())


def test_a_share_of_channels_is_not_rounded_down_below_a_whole_number(data):
    net = nets.small_cnn(10, SHAPE, 100)
    assert {name: len(one) for name, one in channels.choose(net, data, "l1", 0.29).items()} == {"0": 29, "4": 58}


# Allocation.


def allocated(net, data, contribution, share, tilt):
    """The shares of an allocation and the MACs of the network without them."""
    shares = channels.allocate(net, data.shape, contribution, share, tilt)
    return shares, cost.count(channels.remove(net, data.shape, channels.choose(net, data, "l1", shares)), data.shape).macs


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("tilt", [-0.5, 0.5, 0.9])
@pytest.mark.parametrize("build", [lambda: nets.vgg(11, 10, 1, 16), lambda: nets.resnet(20, 10, 1, 16)])
def test_an_allocation_leaves_the_macs_of_the_uniform_share(data, build, tilt, share):
    net = build()
    names = channels.removable(net, data.shape)
    contribution = dict(zip(names, np.random.default_rng(0).permutation(len(names)), strict=True))
    uniform = cost.count(channels.remove(net, data.shape, channels.choose(net, data, "l1", share)), data.shape).macs
    shares, macs = allocated(net, data, contribution, share, tilt)
    assert macs == pytest.approx(uniform, rel=0.01)
    # From the layer that contributes least to the one that contributes most, up to a channel of rounding.
    ordered = [shares[name] for name in sorted(names, key=contribution.get, reverse=tilt < 0)]
    assert all(later <= earlier + 3 / 16 for earlier, later in zip(ordered, ordered[1:], strict=False))
    assert ordered[0] > share > ordered[-1]


def test_an_allocation_follows_its_formula(data):
    net = nets.vgg(11, 10, 1, 16)
    names = channels.removable(net, data.shape)
    contribution = {name: float(i) for i, name in enumerate(names)}
    shares = channels.allocate(net, data.shape, contribution, 0.3, 0.5)
    n = len(names)
    weights = [1 + 0.5 * (n + 1 - 2 * rank) / (n - 1) for rank in range(1, n + 1)]
    factor = [shares[name] / weight for name, weight in zip(names, weights, strict=True)]
    a = shares[names[-1]] / weights[-1]  # its layer is one of the widest, so that rounding is least
    width = [net.get_submodule(name).out_channels for name in names]
    assert all(abs(one - a) * weight <= 2 / c for one, weight, c in zip(factor, weights, width, strict=True))
    same = channels.allocate(net, data.shape, dict.fromkeys(names, 1.0), 0.3, 0.5)
    assert same == channels.allocate(net, data.shape, contribution, 0.3, 0)
    assert all(abs(one - 0.3) <= 1 / 16 for one in same.values())
    high = channels.allocate(net, data.shape, contribution, 0.95, 0.5)
    assert all(round(share * c) < c for share, c in zip(high.values(), width, strict=True))


def test_macs_of_an_allocation_are_those_of_the_network_without_the_channels(any_net):
    names = channels.removable(any_net, SHAPE)
    removed = [1 + i % (any_net.get_submodule(name).out_channels - 1) for i, name in enumerate(names)]
    smaller = channels.remove(any_net, SHAPE, {name: range(count) for name, count in zip(names, removed, strict=True)})
    assert channels._macs_left(any_net, SHAPE, names)(np.array(removed)) == cost.count(smaller, SHAPE).macs


def test_each_layer_can_have_a_share_of_its_own(net, data):
    chosen = channels.choose(net, data, "kl", {"4": 0.25, "0": 0.5}, images=30)
    assert {name: len(one) for name, one in chosen.items()} == {"0": 4, "4": 4}
    assert list(channels.choose(net, data, "l1", {"4": 0.25})) == ["4"]
    assert channels.choose(net, data, "kl", {}, images=30) == channels.choose(net, data, "l1", {}) == {}


# Removal.


def test_removal_gives_the_outputs_of_the_masked_network_from_fewer_weights(any_net):
    chosen = {name: [1, 2] for name in channels.removable(any_net, SHAPE)}
    smaller = channels.remove(any_net, SHAPE, chosen)
    masks = channels.reader_masks(any_net, SHAPE, chosen)
    images = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(1))
    expected = channels.masked_logits(any_net, images, masks)
    with torch.no_grad():
        assert (smaller(images) - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (any_net(images) - expected).abs().max() > 1e-3 * expected.abs().max()
    assert cost.count(smaller, SHAPE).parameters < cost.count(any_net, SHAPE).parameters
    assert not any("mask" in name for name in smaller.state_dict())


def test_muted_channels_of_a_plain_network_and_removed_ones_give_the_same(net):
    muted = copy.deepcopy(net)
    muted[1].weight.data[[0, 4]], muted[1].bias.data[[0, 4]] = 0, 0
    smaller = channels.remove(net, SHAPE, {"0": [4, 0]})
    assert smaller[0].out_channels == 6
    assert smaller[1].num_features == 6
    images = torch.randn(5, *SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(smaller(images), muted(images), rtol=1e-5, atol=1e-6)


def test_removed_networks_can_be_trained(any_net):
    smaller = channels.remove(any_net, SHAPE, {name: [0] for name in channels.removable(any_net, SHAPE)})
    smaller.train()(torch.randn(4, *SHAPE)).sum().backward()
    assert all(parameter.grad is not None for parameter in smaller.parameters())


def test_only_inner_channels_of_a_resnet_are_removable():
    names = channels.removable(nets.resnet(8, 10, 1, 4), SHAPE)
    assert names == ["steps.0.conv1", "steps.1.conv1", "steps.2.conv1"]


def test_removal_from_a_padded_residual_stream_is_refused():
    with pytest.raises(ValueError, match="remove only channels of layers that removable"):
        channels.remove(with_statistics(nets.resnet(8, 10, 1, 4)), SHAPE, {"conv": [1]})


def test_removal_that_cannot_be_is_refused(net):
    with pytest.raises(ValueError, match="no convolution named 9"):
        channels.remove(net, SHAPE, {"9": [0]})
    with pytest.raises(ValueError, match="channels 0 to 7"):
        channels.remove(net, SHAPE, {"0": [8]})
    with pytest.raises(ValueError, match="leave at least one"):
        channels.remove(net, SHAPE, {"0": range(8)})


def grouped():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 3),
                         nn.ReLU(), nn.Flatten(), nn.Linear(32, 10)).eval()


@pytest.mark.parametrize(("build", "names"), [
    (lambda: nets.maxout_net(width=16), []), (grouped, ["4"]), (lambda: nets.relation_net("channel3d", width=16), []),
    (lambda: nets.relation_net("separable", width=16), ["11.1"]),
    (lambda: nn.Sequential(nn.Conv2d(1, 1, 1), *grouped()), ["5"])])
def test_layers_whose_channels_are_bound_together_are_not_removable(build, names):
    torch.manual_seed(0)
    assert channels.removable(with_statistics(build()), SHAPE) == names


@pytest.mark.parametrize("positions", [[1], [0, 1], [0, 2, 5], range(0, 16, 2)])
def test_removal_of_other_channels_than_were_asked_for_is_refused(positions):
    torch.manual_seed(0)
    net = with_statistics(nets.maxout_net(width=16))
    for call in (channels.remove, channels.plan):
        with pytest.raises(ValueError, match=r"would (lose|have weights) .*: remove only channels of layers that removable"):
            call(net, SHAPE, {"0": positions})
    with pytest.raises(ValueError, match="remove only channels of layers that removable"):
        channels.remove(net, SHAPE, channels.choose(net, ImageData("digits", device="cpu", limit=100), "l1", layers=["0", "4"]))


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, 10)

    def forward(self, x):
        if x.shape[0] == 1:
            raise RuntimeError("batches of one are not for me")
        return self.fc(self.conv(x).mean((2, 3)))


def test_a_network_that_cannot_be_traced_is_named():
    with pytest.raises(ValueError, match="torch-pruning cannot trace Untraceable"):
        channels.remove(Untraceable(), SHAPE, {"conv": [0]})


def test_plan_tells_what_removal_does(net):
    plan = channels.plan(net, SHAPE, {"0": [0, 1], "4": [3]})
    smaller = channels.remove(net, SHAPE, {"0": [0, 1], "4": [3]})
    assert plan.after.tolist() == [smaller[0].out_channels, smaller[4].out_channels] == [6, 15]
    assert plan["read by"].tolist() == ["4", "9"]
