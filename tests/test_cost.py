import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fishlib import cost, nets


def test_the_power_of_the_second_proposal():
    assert cost.power(1e9, 20) == pytest.approx(12.8)


@pytest.mark.parametrize(("depth", "parameters", "flops"), [(56, 853_018, 126.551), (110, 1_727_962, 254.985)])
def test_resnets_have_the_decoded_costs(depth, parameters, flops):
    found = cost.count(nets.resnet(depth), (3, 32, 32))
    assert found.parameters == parameters
    assert found.flops / 1e6 == pytest.approx(flops, abs=5e-4)


@pytest.mark.parametrize(("net", "parameters"), [
    (nets.lenet300(), 266_610), (nets.lenet5(), 431_080), (nets.classic_lenet5(), 61_706)])
def test_lenets_have_the_published_sizes(net, parameters):
    assert cost.count(net, (1, 28, 28)).parameters == parameters


@settings(max_examples=25, deadline=None)
@given(before=st.integers(1, 3), after=st.integers(1, 3), groups=st.integers(1, 3), kernel=st.integers(1, 3),
       stride=st.integers(1, 2), padding=st.integers(0, 2), side=st.integers(4, 9))
def test_convolutions_cost_what_their_loops_do(before, after, groups, kernel, stride, padding, side):
    layer = nn.Conv2d(before * groups, after * groups, kernel, stride, padding, groups=groups)
    positions = len(range(0, side + 2 * padding - kernel + 1, stride)) ** 2
    found = cost.count(layer, (before * groups, side, side))
    assert found.macs == positions * after * groups * before * kernel**2
    assert found.activations == positions * after * groups

@settings(max_examples=15, deadline=None)
@given(before=st.integers(1, 3), after=st.integers(1, 3), groups=st.integers(1, 3), kernel=st.integers(1, 3),
       stride=st.integers(1, 2), side=st.integers(2, 5))
def test_transposed_convolutions_cost_what_their_loops_over_inputs_do(before, after, groups, kernel, stride, side):
    layer = nn.ConvTranspose2d(before * groups, after * groups, kernel, stride, groups=groups)
    found = cost.count(layer, (before * groups, side, side))
    assert found.macs == side**2 * before * groups * after * kernel**2


class Functional(nn.Module):
    """BatchNorm, ReLU and a matrix product without modules of their own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5, 12))

    def forward(self, x):
        x = F.batch_norm(x, torch.zeros(3), torch.ones(3))
        return F.relu(x).flatten(1) @ self.weight.T


def test_functional_code_counts_like_modules():
    modules = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5, bias=False))
    expected, found = cost.count(modules, (3, 2, 2)), cost.count(Functional(), (3, 2, 2))
    assert (found.macs, found.norm_outputs, found.relu_outputs) == (60, 12, 12)
    assert found.flops == expected.flops
    assert found.parameters == expected.parameters


class Attention(nn.Module):
    """Self-attention of one head, by the module or by the function on its projections."""

    def __init__(self, functional):
        super().__init__()
        self.functional, self.own = functional, nn.MultiheadAttention(8, 1, batch_first=True)

    def forward(self, x):
        if not self.functional:
            return self.own(x, x, x, need_weights=False)[0]
        q, k, v = F.linear(x, self.own.in_proj_weight, self.own.in_proj_bias).chunk(3, -1)
        return self.own.out_proj(F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("functional", [True, False])
def test_attention_costs_its_projections_and_both_products_and_fused_kernels_stay_switched_on(functional):
    found = cost.count(Attention(functional), (10, 8))
    assert found.macs == 4 * 10 * 8 * 8 + 2 * 10 * 10 * 8
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()

def test_products_of_batches_of_matrices_are_counted_with_and_without_an_addend():
    class Products(nn.Module):
        def forward(self, x):
            return torch.baddbmm(torch.zeros(1, 4, 5), x, torch.ones(1, 3, 5)) @ torch.ones(1, 5, 2)

    assert cost.count(Products(), (4, 3)).macs == 4 * 3 * 5 + 4 * 5 * 2


def test_a_network_in_training_costs_what_it_does_in_evaluation():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU())
    assert cost.count(net.train(), (4,)).norm_outputs == cost.count(net.eval(), (4,)).norm_outputs == 3


def test_the_table_of_layers_adds_up_to_the_whole():
    found = cost.count(nets.resnet(20), (3, 32, 32))
    assert found.layers["macs"].sum() == found.macs
    assert found.layers["parameters"].sum() == found.parameters
    assert found.layers["layer"].is_unique


def test_energy_follows_the_table_by_hand():
    found = cost.count(nn.Linear(10, 4, bias=False), (10,))
    energy = found.energy() * 1e6
    assert energy["arithmetic"] == pytest.approx(40 * (0.9 + 3.7))
    assert energy["weights from DRAM"] == pytest.approx(40 * 640)
    assert energy["activations in SRAM"] == pytest.approx(2 * 4 * 5)
    short = cost.count(nn.Linear(10, 4, bias=False), (10,), bits=8).energy() * 1e6
    assert short["weights from DRAM"] == pytest.approx(40 * 160)
    with pytest.raises(ValueError, match="bits=3"):
        cost.count(nn.Linear(10, 4), (10,), bits=3).energy()


@pytest.mark.parametrize(("sram", "of_64_bits"), [("sram 8 KB", 10), ("sram 32 KB", 20), ("sram 1 MB", 100)])
def test_a_larger_memory_makes_activations_dearer_and_nothing_else(sram, of_64_bits):
    found = cost.count(nn.Linear(10, 4, bias=False), (10,))
    energy = found.energy(sram)
    assert energy["activations in SRAM"] * 1e6 == pytest.approx(2 * 4 * of_64_bits / 2)
    assert energy.drop("activations in SRAM").equals(found.energy().drop("activations in SRAM"))


def test_a_memory_that_the_table_lacks_is_refused_with_those_it_has():
    with pytest.raises(ValueError, match=r"'sram 2 KB'.*'sram 8 KB', 'sram 32 KB', 'sram 1 MB'"):
        cost.count(nn.Linear(10, 4), (10,)).energy("sram 2 KB")


@pytest.mark.parametrize(("bits", "add", "multiply"), [(32, 0.9, 3.7), (16, 0.4, 1.1), (8, 0.03, 0.2)])
def test_energy_counts_an_add_for_each_output_of_batchnorm_and_relu_and_words_of_32_bits(bits, add, multiply):
    net = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU())
    found = cost.count(net, (2, 4, 4), bits)
    energy = found.energy() * 1e6
    assert energy["arithmetic"] == pytest.approx(16 * 6 * (add + multiply) + 2 * 16 * 3 * add)
    assert energy["weights from DRAM"] == pytest.approx((6 + 6) * bits / 32 * 640)
    assert energy["activations in SRAM"] == pytest.approx(2 * 3 * 16 * 3 * bits / 32 * 5)
    assert found.weight_bytes == 12 * bits / 8


def test_latency_is_the_median_of_the_passes_after_three(monkeypatch):
    durations, ticks = [9, 9, 9, 1, 5, 2, 4, 3], [0.0]
    for duration in durations:
        ticks += [ticks[-1] + duration, ticks[-1] + duration]
    clock = iter(ticks)
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(clock))
    assert cost.latency(nn.Linear(4, 2), (4,), repeats=5) == 3


def test_counting_and_timing_leave_the_network_as_it_was():
    net = nets.small_cnn(10, (1, 8, 8))
    net[1].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    cost.count(net, (1, 8, 8))
    assert cost.latency(net, (1, 8, 8), repeats=2) > 0
    assert net.training
    assert not net[1].training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_work_of_a_module_with_two_parents_is_counted():
    relu = nn.ReLU()
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4), relu), nn.Sequential(nn.Linear(4, 4), relu))
    assert cost.count(net, (4,)).relu_outputs == 8


def test_costs_are_the_same_in_inference_mode():
    with torch.inference_mode():
        assert cost.count(nets.lenet5(), (1, 28, 28)).macs == cost.count(nets.lenet5(), (1, 28, 28)).macs == 2_293_000

