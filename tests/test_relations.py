"""Layers along the channel axis: against loops, their formulas, and the networks built from them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fishlib import cost, nets, relations
from fishlib.nets.relation import RELATIONS


def by_loops(layer, x):
    """The definition, output channel by output channel."""
    x = layer.mix(x)
    x = x if layer.order is None else x[:, layer.order]
    depth, weight, padding = layer.depth, layer.conv.weight, layer.conv.padding[1:]
    half = weight.shape[2] // 2
    out = []
    for group in range(layer.groups_out):
        for c in range(depth):
            total = 0 if layer.conv.bias is None else layer.conv.bias[group]
            for g in range(layer.groups_in):
                for e in range(weight.shape[2]):
                    if 0 <= c + e - half < depth:
                        plane = x[:, g * depth + c + e - half][:, None]
                        total = total + F.conv2d(plane, weight[group, g, e][None, None], None, layer.stride, padding)[:, 0]
            out.append(total if torch.is_tensor(total) else torch.zeros_like(out[0]))
    return torch.stack(out, 1)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.sampled_from([1, 3, 5]), st.sampled_from([1, 3]),
       st.integers(1, 2), st.booleans(), st.booleans())
def test_both_forms_of_the_layer_are_its_definition(groups_in, depth, groups_out, extent, kernel, stride, mix, bias):
    channels = groups_in * depth
    torch.manual_seed(0)
    x = torch.randn(2, channels, 5, 6, dtype=torch.float64)
    layer = relations.ChannelConv3d(channels, groups_in, groups_out, kernel, extent, stride, mix,
                                    torch.randperm(channels).tolist(), bias).double()
    if bias:
        nn.init.normal_(layer.conv.bias)
    expected = by_loops(layer, x)
    for dense in (True, False):
        layer.dense = dense
        torch.testing.assert_close(layer(x), expected)
    assert expected.shape[1] == layer.out_channels


def test_both_forms_have_the_same_gradients():
    layer = relations.ChannelConv3d(12, 3).double()
    x = torch.randn(2, 12, 5, 5, dtype=torch.float64)
    gradients = []
    for dense in (True, False):
        layer.dense = dense
        gradients.append(torch.autograd.grad(layer(x).square().sum(), layer.conv.weight)[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("mix", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_formulas_of_cost_are_what_is_counted(mix, stride):
    layer = relations.ChannelConv3d(64, 8, 4, stride=stride, mix=mix, bias=True, dense=False)
    counted = cost.count(layer, (64, 9, 8))
    assert counted.parameters == layer.parameters_formula
    assert counted.macs == layer.macs_formula(9, 8)


def test_weights_do_not_grow_with_the_number_of_channels():
    assert relations.ChannelConv3d(64, 8).parameters_formula == 8 * 8 * 3 * 9 == 1728
    assert relations.ChannelConv3d(128, 8).parameters_formula == 1728


def test_shifting_channels_within_a_group_shifts_the_outputs():
    layer = relations.ChannelConv3d(8, 1).double()
    x = torch.zeros(1, 8, 4, 4, dtype=torch.float64)
    x[:, 2:5] = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x.roll(1, 1)), layer(x).roll(1, 1))


def test_an_order_can_be_undone_by_ordering_the_input():
    order = [3, 1, 0, 2, 5, 4]
    plain, ordered = relations.ChannelConv3d(6, 2), relations.ChannelConv3d(6, 2, order=order)
    ordered.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 6, 4, 4)
    torch.testing.assert_close(ordered(x), plain(x[:, order]))


def test_a_learned_order_starts_as_the_own_one_and_becomes_the_one_that_fits():
    torch.manual_seed(0)
    order, wanted = relations.ChannelOrder(6), torch.tensor([2, 0, 1, 5, 3, 4])
    assert order.positions() == list(range(6))
    optimizer = torch.optim.Adam(order.parameters(), 0.02)
    for _ in range(150):
        x = torch.randn(32, 6, 2, 2)
        loss = (order(x) - x[:, wanted]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert order.positions() == wanted.tolist()


def test_a_learned_order_permutes_exactly_and_its_soft_form_sums_to_one():
    order, x = relations.ChannelOrder(5, iterations=50).double(), torch.randn(2, 5, 3, 3, dtype=torch.float64)
    nn.init.normal_(order.scores, std=0.1)
    expected = x[:, order.positions()]
    torch.testing.assert_close(order(x), expected)
    torch.testing.assert_close(order.eval()(x), expected, rtol=0, atol=0)
    for dimension in (0, 1):
        torch.testing.assert_close(order.soft().sum(dimension), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-6)


def test_settling_a_learned_order_keeps_the_outputs_and_drops_the_scores():
    torch.manual_seed(0)
    net = nets.relation_net("learned3d", width=16, groups=4).eval()
    for layer in (net[3], net[7], net[11]):
        nn.init.normal_(layer.arrange.scores)
    fixed, x = relations.settled(net), torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(fixed(x), net(x))
    before, after = (cost.count(one, (1, 8, 8)).parameters for one in (net, fixed))
    assert before - after == 3 * 16**2 == 3 * (net[3].parameters_formula - fixed[3].parameters_formula)
    assert isinstance(net[3].arrange, relations.ChannelOrder)


@pytest.mark.parametrize("build", [lambda: nets.vgg(11, 10, 1, 8), lambda: nets.resnet(8, 10, 1, 8)])
def test_swapping_keeps_shapes_and_the_original_and_leaves_the_share_of_weights_of_the_formula(build):
    net, x = build().eval(), torch.randn(2, 1, 32, 32)
    before = net(x)
    swap = relations.swapped(net, 4, mix=False).eval()
    assert swap(x).shape == before.shape
    torch.testing.assert_close(net(x), before, rtol=0, atol=0)
    layers = [layer for layer in swap.modules() if isinstance(layer, relations.ChannelConv3d)]
    ordinary = [conv for conv in net.modules() if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3)]
    assert len(layers) == len(ordinary) - 1  # the first one reads an image
    saved = sum(9 * layer.channels * layer.out_channels - layer.parameters_formula for layer in layers)
    shape = (1, 32, 32)
    assert cost.count(net, shape).parameters - cost.count(swap, shape).parameters == saved
    assert sum(layer.parameters_formula for layer in layers) * 16 == 3 * sum(9 * layer.channels * layer.out_channels
                                                                             for layer in layers)


def test_swapping_keeps_what_it_cannot_replace():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=2),
                        nn.Conv2d(8, 8, 3), nn.Conv2d(8, 16, 5, 2, 2))
    swap = relations.swapped(net, 2)
    assert [type(layer) for layer in swap] == [nn.Conv2d] * 4 + [relations.ChannelConv3d]
    assert swap[4].conv.bias is not None
    x = torch.randn(1, 3, 9, 9)
    assert swap(x).shape == net(x).shape
    with pytest.raises(ValueError, match="no convolution of Sequential"):
        relations.swapped(net[:2], 2)


def test_swapping_keeps_modes_frozen_weights_and_the_random_state():
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding="same")).eval()
    net[0].requires_grad_(False)
    before = torch.get_rng_state()
    swap = relations.swapped(net)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in swap.modules())
    assert not any(parameter.requires_grad for parameter in swap[0].parameters())
    assert all(parameter.requires_grad for parameter in swap[1].parameters())
    assert not torch.equal(swap[0].conv.weight, swap[1].conv.weight)


def test_swapping_leaves_padding_other_than_zeros_alone():
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), nn.Conv2d(8, 8, 3, padding=1))
    assert [type(layer) for layer in relations.swapped(net)] == [nn.Conv2d, relations.ChannelConv3d]


def test_maxout_is_the_maximum_of_neighbours():
    x = torch.randn(2, 6, 3, 3)
    found = relations.Maxout(3)(x)
    torch.testing.assert_close(found[:, 1], torch.maximum(torch.maximum(x[:, 3], x[:, 4]), x[:, 5]))


def test_triplanar_is_the_sum_of_three_planes():
    layer = relations.TriPlanar(6, 2).double()
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    volume = x.reshape(2, 2, 3, 4, 5)
    expected = F.conv2d(x, layer.rows_columns.weight, padding=1, groups=6)
    for column in range(5):
        plane = F.conv2d(volume[..., column], layer.channels_rows.weight[..., 0], padding=1)
        expected[..., column] += plane.reshape(2, 6, 4)
    for row in range(4):
        plane = F.conv2d(volume[..., row, :], layer.channels_columns.weight[..., 0, :], padding=1)
        expected[..., row, :] += plane.reshape(2, 6, 5)
    torch.testing.assert_close(layer(x), expected)
    assert cost.count(relations.TriPlanar(64, 8), (64, 4, 4)).parameters == 64 * 9 + 2 * 64 * 9


def test_gates_come_from_neighbouring_means():
    layer, x = relations.ChannelAttention(), torch.randn(1, 4, 3, 3)
    means, weight = x.mean((2, 3))[0], layer.conv.weight[0, 0]
    gate = torch.sigmoid(weight[0] * means[1] + weight[1] * means[2] + weight[2] * means[3])
    torch.testing.assert_close(layer(x)[0, 2], x[0, 2] * gate)


def test_sorting_puts_similar_channels_side_by_side():
    pairs = torch.eye(6)
    for a, b in ((0, 3), (1, 5), (2, 4)):
        pairs[a, b] = pairs[b, a] = -0.9
    order = relations.sorted_order(pairs)
    assert sorted(order) == list(range(6))
    assert all(abs(order.index(a) - order.index(b)) == 1 for a, b in ((0, 3), (1, 5), (2, 4)))
    assert relations.sorted_order(1 - pairs.abs(), distance=True) == order


@pytest.mark.parametrize("relation", RELATIONS)
def test_networks_differ_only_in_their_inner_layers(relation):
    net, twin = nets.relation_net(relation, width=16, groups=4), nets.relation_net("conv2d", width=16)
    assert net(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    differ = [i for i, (a, b) in enumerate(zip(net, twin, strict=True)) if type(a) is not type(b)]
    assert differ == ([] if relation == "conv2d" else [3, 7, 11])
    if relation != "conv2d":
        assert cost.count(net, (1, 8, 8)).parameters < cost.count(twin, (1, 8, 8)).parameters


def test_maxout_network_runs_with_fewer_weights_than_its_twin():
    net, twin = nets.maxout_net(width=16), nets.relation_net("conv2d", width=16)
    assert net(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    assert cost.count(net, (1, 8, 8)).parameters < cost.count(twin, (1, 8, 8)).parameters


@pytest.mark.parametrize(("call", "message"), [
    (lambda: relations.ChannelConv3d(10, 4), "groups_in=4 does not divide channels=10"),
    (lambda: relations.ChannelConv3d(8, 0), "groups_in=0 does not divide"),
    (lambda: relations.ChannelConv3d(8, 4, groups_out=0), "groups_out=0"),
    (lambda: relations.ChannelConv3d(8, 4, stride=0), "stride=0"),
    (lambda: relations.ChannelConv3d(8, 4, depth=2), "depth=2: use an odd size"),
    (lambda: relations.ChannelConv3d(8, 4, kernel=2), "kernel=2: use an odd size"),
    (lambda: relations.ChannelConv3d(4, 2, order=[0, 1, 1, 2]), "once"),
    (lambda: relations.Maxout(0), "pieces=0"),
    (lambda: relations.Maxout(2)(torch.zeros(1, 3, 2, 2)), "groups of 2"),
    (lambda: relations.TriPlanar(10, 4), "groups=4 does not divide"),
    (lambda: relations.TriPlanar(8, 0), "groups=0 does not divide"),
    (lambda: relations.TriPlanar(8, 4, kernel=2), "kernel=2: use an odd size"),
    (lambda: relations.ChannelAttention(2), "kernel=2: use an odd size"),
    (lambda: relations.swapped(nn.Conv2d(8, 8, 3, padding=1), 0), "neighbours=0"),
    (lambda: relations.swapped(nn.Conv2d(8, 8, 3, padding=1), depth=2), "depth=2: use an odd size"),
    (lambda: relations.sorted_order(torch.full((3, 3), float("nan"))), "finite matrix"),
    (lambda: nets.relation_net("conv4d"), "use one of conv2d"),
    (lambda: nets.relation_net("conv2d", orders=[[0]]), "orders are for"),
    (lambda: nets.maxout_net(width=9), "does not divide width"),
    (lambda: nets.maxout_net(pieces=0), "does not divide width"),
])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
