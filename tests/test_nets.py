"""Networks with units: their costs, alpha, and removal for good."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fishlib import cost, nets, units

SHAPE = (3, 32, 32)
SMALL = {
    "resnet": lambda: nets.resnet(20, width=4),
    "plain": lambda: nets.plain(20, width=4),
    "vgg": lambda: nets.vgg(11, width=4),
    "densenet": lambda: nets.densenet(22, growth=4),
}


def lived_in(net, seed=0):
    """The network in float64 with BatchNorm statistics and weights as after some training."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in net.state_dict().items():
        if "running_var" in name or ("bn" in name and name.endswith("weight")):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        elif "running_mean" in name or name.endswith("bias"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return net.double()


@pytest.fixture(scope="module", params=SMALL)
def net(request):
    torch.manual_seed(0)
    return lived_in(SMALL[request.param]())


def images(n=4, side=16):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(("build", "parameters", "flops"), [
    (lambda: nets.resnet(56), 853_018, 126.551),
    (lambda: nets.resnet(110), 1_727_962, 254.985),
    (lambda: nets.densenet(100, 12), 769_162, 296.483)])
def test_full_networks_cost_what_the_published_tables_say(build, parameters, flops):
    found = cost.count(build(), SHAPE)
    assert found.parameters == parameters
    assert round(found.flops / 1e6, 3) == flops


@pytest.mark.parametrize(("depth", "classes", "kept", "without_first", "parameters", "flops"), [
    (56, 10, (6, 2, 2), (1, 2), 214_234, 48.153),
    (110, 10, (12, 6, 2), (2,), 311_898, 94.684),
    (110, 100, (15, 7, 4), (2,), 498_292, 123.263)])
def test_pruned_networks_cost_what_the_published_tables_say(depth, classes, kept, without_first, parameters, flops):
    net = nets.resnet(depth, classes)
    stages = [[place for place, unit in enumerate(net.units) if unit.stage == stage] for stage in range(3)]
    chosen = [stages[stage][(stage in without_first):][:count] for stage, count in enumerate(kept)]
    found = cost.count(units.keep(net, sum(chosen, [])), SHAPE)  # noqa: RUF017
    assert found.parameters == parameters
    assert round(found.flops / 1e6, 3) == flops


def test_plain_twin_has_the_layers_of_the_resnet():
    twin, net = nets.plain(20), nets.resnet(20)
    assert {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}


def test_units_are_listed_in_order_with_stage_and_index(net):
    assert [unit.index for unit in net.units] == list(range(len(net.units)))
    assert [unit.stage for unit in net.units] == sorted(unit.stage for unit in net.units)
    assert all(unit.active and unit.alpha == 1 for unit in net.units)


@settings(max_examples=12, deadline=None)
@given(chosen=st.sets(st.integers(0, 8)), family=st.sampled_from(sorted(SMALL)))
def test_network_with_alphas_and_smaller_network_have_the_same_outputs(chosen, family):
    torch.manual_seed(0)
    net = lived_in(SMALL[family](), seed=len(chosen))
    chosen = {unit for unit in chosen if unit < len(net.units)}
    smaller = units.keep(net, chosen).eval()
    x = images()
    with torch.no_grad(), units.removed(net, set(range(len(net.units))) - chosen):
        expected = net.eval()(x)
    found = smaller(x)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_switched_off_unit_passes_the_state_on_and_is_not_computed(net):
    x = net.stem(images())
    unit = net.units[0]

    def fail(*_):
        raise AssertionError("computed")

    hook = unit.writer.register_forward_hook(fail)
    try:
        with units.removed(net, [0]):
            after = unit(x)
    finally:
        hook.remove()
    assert after.shape == unit(x).shape
    assert torch.isclose(after.abs().sum(), x.abs().sum())


def test_residual_unit_is_its_shortcut_when_switched_off():
    net = nets.resnet(20, width=4)
    first_of_stage = net.units[3]
    x = torch.rand(2, 4, 8, 8)
    first_of_stage.switch(False)
    after = first_of_stage(x)
    assert after.shape == (2, 8, 4, 4)
    assert torch.equal(after[:, 2:6], x[:, :, ::2, ::2])
    assert after[:, :2].abs().sum() + after[:, 6:].abs().sum() == 0


def test_alpha_saves_and_loads(net):
    other = copy.deepcopy(net)
    other.units[1].switch(False)
    fresh = copy.deepcopy(net)
    fresh.load_state_dict(other.state_dict())
    assert [unit.active for unit in fresh.units] == [unit.active for unit in other.units]
    x = images()
    assert torch.equal(fresh.eval()(x), other.eval()(x))


def test_change_of_the_buffer_itself_is_noticed_also_in_copies():
    net = nets.resnet(20, width=4)
    assert net.units[2].active
    net.units[2].alpha.zero_()
    twin = copy.deepcopy(net)
    assert not twin.units[2].active
    assert not net.units[2].active
    twin.units[2].alpha.fill_(1)
    assert twin.units[2].active
    assert not net.units[2].active


def test_compiled_network_follows_alpha():
    net = nets.resnet(8, width=4).eval()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(compiled(x), net(x), atol=1e-6)
    net.units[0].switch(False)
    expected = net(x)
    assert torch.allclose(compiled(x), expected, atol=1e-6)


def test_smaller_network_is_smaller_in_parameters_operations_and_file(net):
    def size(one):
        buffer = io.BytesIO()
        torch.save(one.state_dict(), buffer)
        return buffer.tell()

    smaller = units.keep(net, range(0, len(net.units), 2))
    before, after = cost.count(net, (3, 16, 16)), cost.count(smaller, (3, 16, 16))
    assert after.parameters < 0.85 * before.parameters
    assert after.macs < before.macs
    assert size(smaller) < size(net)


def test_keeping_leaves_the_network_as_it_was(net):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    units.keep(net, [0])
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_keeping_twice_is_keeping_once(net):
    x = images()
    once = units.keep(net, [1, 3]).eval()
    twice = units.keep(units.keep(net, [0, 1, 3]), [1, 2]).eval()
    assert [unit.index for unit in twice.units] == [1, 3]
    assert torch.allclose(once(x), twice(x), atol=1e-9)


def test_digits_of_8_pixels_pass_through_every_family():
    for build in (lambda: nets.resnet(8, channels=1, width=4), lambda: nets.vgg(16, channels=1, width=4),
                  lambda: nets.densenet(10, 4, channels=1), lambda: nets.plain(8, channels=1, width=4)):
        assert build()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("build", [lambda: nets.resnet(21), lambda: nets.plain(2), lambda: nets.densenet(99),
                                   lambda: nets.vgg(15)])
def test_impossible_depths_are_refused_with_possible_ones(build):
    with pytest.raises(ValueError, match=r"depth=.*layers"):
        build()


def test_a_frozen_densenet_stays_frozen_without_some_units():
    net = nets.densenet(16, 4).requires_grad_(False)
    smaller = units.keep(net, range(1, len(net.units)))
    assert not any(parameter.requires_grad for parameter in smaller.parameters())

