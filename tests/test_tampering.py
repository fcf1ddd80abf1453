"""Changes of weights, searches for the worst one, and certificates, against slow or closed-form oracles."""

import copy
import dataclasses
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm
from scipy.stats import t as student
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fishlib import nets, tampering
from fishlib.data import ImageData
from fishlib.training import evaluate, fit


@pytest.fixture(scope="module")
def data():
    return ImageData("digits", batch_size=32, limit=400, device="cpu")


@pytest.fixture(scope="module")
def net(data):
    torch.manual_seed(0)
    return fit(nets.mlp(data.shape, 10, (16,)), data, epochs=10, lr=2e-2)[0]


@pytest.fixture(scope="module")
def normalised(data):
    torch.manual_seed(0)
    return fit(nets.small_cnn(10, data.shape, width=4), data, epochs=2, lr=2e-2)[0]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", tampering.KINDS)
def test_the_weights_come_back_also_after_an_exception(net, kind):
    before, places = copy.deepcopy(net.state_dict()), [p.data_ptr() for p in net.parameters()]
    state = torch.get_rng_state()

    def fail():
        with tampering.perturb(net, kind, 1, generator()) as inside:
            assert inside is net
            assert any(not torch.equal(value, before[key]) for key, value in net.state_dict().items())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert [p.data_ptr() for p in net.parameters()] == places
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("kind", "unit"), [
    ("range_noise", lambda w: w.max() - w.min()), ("norm_noise", lambda w: w.square().mean().sqrt()),
    ("relative_noise", lambda w: w.abs()), ("gaussian", lambda w: 1.0)])
def test_noise_has_its_stated_size(net, kind, unit):
    draws = [tampering.changed(net, kind, 0.1, generator(seed))["1.weight"] for seed in range(100)]
    w = dict(net.named_parameters())["1.weight"].detach()
    noise = (torch.stack(draws) - w) / unit(w)
    assert noise.mean().abs() < 4 * 0.1 / noise.numel() ** 0.5
    assert noise.std().item() == pytest.approx(0.1, rel=0.02)


def test_deletion_takes_its_share_at_random_or_from_the_largest(net):
    w = dict(net.named_parameters())["1.weight"].detach()
    random = tampering.changed(net, "deletion", 0.3, generator())["1.weight"]
    largest = tampering.changed(net, "deletion_of_largest", 0.3)["1.weight"]
    assert (random == 0).double().mean().item() == pytest.approx(0.3, abs=0.06)
    assert torch.equal(random[random != 0], w[random != 0])
    assert (largest == 0).sum() == round(0.3 * w.numel())
    assert w[largest == 0].abs().min() >= w[largest != 0].abs().max()


@pytest.mark.parametrize("biases", [True, False])
def test_biases_are_left_alone_on_request(net, biases):
    assert ("1.bias" in tampering.changed(net, "deletion", 0.5, generator(), biases)) is biases


@given(st.integers(1, 8), st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=30))
@settings(max_examples=50, deadline=None)
def test_rounding_leaves_at_most_half_a_step(bits, values):
    w = torch.tensor(values)
    rounded = tampering.quantized(w, bits)
    step = (w.max() - w.min()) / (2**bits - 1)
    assert ((rounded - w).abs() <= step / 2 * (1 + 1e-3) + 1e-5).all()
    assert len(rounded.unique()) <= 2**bits


def test_bit_flips_hit_the_stated_share_and_all_bits_alike():
    w = torch.randn(20_000, generator=generator())
    code, step = tampering.to_int8(w)
    after = (tampering.KINDS["bit_flips_int8"](w, 0.05, generator()) / step).round().to(torch.int8)
    hit = ((code ^ after).long() & 255)[:, None] >> torch.arange(8) & 1
    assert torch.allclose(hit.double().mean(0), torch.full((8,), 0.05, dtype=torch.float64), atol=4 * (0.05 / 2e4) ** 0.5)
    after = tampering.KINDS["bit_flips_float32"](w, 0.05, generator()).view(torch.int32)
    hit = ((w.view(torch.int32) ^ after).long() & 0xFFFFFFFF)[:, None] >> torch.arange(32) & 1
    assert torch.allclose(hit.double().mean(0), torch.full((32,), 0.05, dtype=torch.float64), atol=5 * (0.05 / 2e4) ** 0.5)


def test_no_flips_keep_the_rounded_and_the_full_weights(net):
    w = dict(net.named_parameters())["1.weight"].detach()
    step = w.abs().max() / 127
    assert (tampering.changed(net, "bit_flips_int8", 0, generator())["1.weight"] - w).abs().max() <= step / 2 * 1.001
    assert torch.equal(tampering.changed(net, "bit_flips_float32", 0, generator())["1.weight"], w)


@pytest.mark.parametrize(("kind", "amount"), [("wind", 0.1), ("deletion", 1.5), ("range_noise", -1), ("quantization", 0),
                                              ("gaussian", float("nan"))])
def test_a_senseless_change_is_refused(net, kind, amount):
    with pytest.raises(ValueError, match="use"):
        tampering.changed(net, kind, amount)


def test_all_draws_at_once_predict_as_one_after_the_other(net, data):
    images, _ = data.split("test")
    draws = [tampering.changed(net, "range_noise", 0.1, generator(seed)) for seed in range(5)]
    together = tampering.predictions(net, images, draws)
    for row, weights in zip(together, draws, strict=True):
        with tampering.replaced(net, weights):
            assert (net(images).argmax(1) == row).double().mean() > 0.999  # a tie may round either way


def test_the_curve_starts_at_the_accuracy_of_the_network_and_falls(net, data):
    table = tampering.curve(net, data, "range_noise", [0.0, 0.05, 0.5], repeats=4)
    assert table.accuracy[0] == pytest.approx(evaluate(net, data, "test").accuracy)
    assert table.deviation[0] == 0
    assert table.accuracy.is_monotonic_decreasing
    assert (table.low <= table.accuracy).all()
    again = tampering.curve(net, data, "range_noise", [0.0, 0.05, 0.5], repeats=4)
    assert table.equals(again)

@pytest.mark.parametrize("biases", [True, False])
def test_the_interval_of_a_curve_is_students_over_its_draws(net, data, biases):
    table = tampering.curve(net, data, "range_noise", [0.2], repeats=5, biases=biases, seed=3)
    source, values = generator(3), []
    for _ in range(5):
        with tampering.perturb(net, "range_noise", 0.2, source, biases):
            values.append(evaluate(net, data, "test").accuracy)
    low, high = student.interval(0.95, 4, statistics.mean(values), statistics.stdev(values) / 5**0.5)
    assert table.accuracy[0] == pytest.approx(statistics.mean(values))
    assert table.deviation[0] == pytest.approx(statistics.stdev(values))
    assert (table.low[0], table.high[0]) == (pytest.approx(low), pytest.approx(high))


def test_outputs_that_are_not_numbers_count_as_wrong(net, data):
    broken = {name: torch.full_like(p, float("nan")) for name, p in net.named_parameters()}
    assert tampering.accuracies(net, data, [broken]) == [0.0]


def test_statistics_are_taken_anew_for_the_changed_weights_only(normalised, data):
    before = copy.deepcopy(normalised.state_dict())
    weights = tampering.changed(normalised, "range_noise", 0.2, generator(), biases=False)
    buffers = tampering.reestimated(normalised, data, weights, batches=3)
    assert all(torch.equal(value, before[key]) for key, value in normalised.state_dict().items())
    slow = copy.deepcopy(normalised)
    slow.load_state_dict(before | weights)
    for module in slow.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    for _, (images, _) in zip(range(3), data.batches("train", 512, shuffle=False), strict=False):
        slow(images)
    expected = dict(slow.named_buffers())
    for name, value in buffers.items():
        if "running" in name:
            torch.testing.assert_close(value, expected[name])


def test_taking_statistics_anew_leaves_every_module_in_its_mode(normalised, data):
    net = copy.deepcopy(normalised).train()
    tampering.reestimated(net, data, dict(net.named_parameters()), batches=1)
    assert all(module.training for module in net.modules())


def test_accuracies_with_statistics_taken_anew_are_those_under_each_draw_s_own(normalised, data):
    draws = [tampering.changed(normalised, "range_noise", 0.3, generator(seed)) for seed in range(3)]
    own = [weights | tampering.reestimated(normalised, data, weights) for weights in draws]
    found = tampering.accuracies(normalised, data, draws, reestimate=True)
    assert found == tampering.accuracies(normalised, data, own)
    assert found != tampering.accuracies(normalised, data, draws)


def test_each_flip_changes_one_bit_and_the_search_beats_chance(net, data):
    images, labels = data.split("validation")
    history = tampering.flip_bits(net, images, labels, 5)
    codes = {name: tampering.to_int8(w) for name, w in tampering.trained(net, biases=False).items()}
    before = {name: code.clone() for name, (code, _) in codes.items()}
    for name, index, bit, weights in history:
        after = {key: (w / codes[key][1]).round().to(torch.int8) for key, w in weights.items()}
        different = {key: (after[key] ^ before[key]).long() & 255 for key in after}
        assert sum(int((d != 0).sum()) for d in different.values()) == 1
        assert different[name].flatten()[index] == 1 << bit
        before = after
    searched = tampering.accuracies(net, data, [history[-1][3]], "validation")[0]
    bits = 8 * sum(code.numel() for code, _ in codes.values())
    random = [tampering.changed(net, "bit_flips_int8", 5 / bits, generator(seed), biases=False) for seed in range(10)]
    assert searched < min(tampering.accuracies(net, data, random, "validation"))


def test_the_first_flip_is_the_best_of_the_candidates_of_each_tensor(net, data):
    images, labels = data.split("validation")
    (name, index, bit, _), = tampering.flip_bits(net, images, labels, 1)
    losses = []
    rounded = {key: code.float() * step for key, (code, step) in
               ((key, tampering.to_int8(w)) for key, w in tampering.trained(net, biases=False).items())}
    for key, w in rounded.items():
        leaf = w.clone().requires_grad_()
        gradient, = torch.autograd.grad(tampering._value(net, rounded | {key: leaf}, images, labels), [leaf])
        code, step = tampering.to_int8(dict(net.named_parameters())[key].detach())
        best = max(((gradient.flatten()[i] * (flipped.flatten()[i].float() - code.flatten()[i].float()) * step).item(), i, b)
                   for b in range(8)
                   for flipped in [code ^ torch.tensor(1 << b).to(torch.int8)] for i in range(code.numel()))
        tried = code.flatten().clone()
        tried[best[1]] ^= torch.tensor(1 << best[2]).to(torch.int8)
        loss = tampering._value(net, rounded | {key: tried.view(code.shape).float() * step}, images, labels)
        losses.append((loss.item(), key, best[1], best[2]))
    assert max(losses)[1:] == (name, index, bit)


@pytest.mark.parametrize("norm_name", ["l2", "linf"])
def test_the_adversary_stays_within_its_budget_and_beats_noise_of_the_same_size(net, data, norm_name):
    images, labels = data.split("validation")
    radius = 0.1 if norm_name == "l2" else 0.02
    start, found = tampering.trained(net), tampering.adversary(net, images, labels, radius, norm_name)
    change = {key: found[key] - start[key] for key in start}
    length = sum(d.square().sum() for d in change.values()).sqrt()
    if norm_name == "l2":
        assert length <= radius * sum(w.square().sum() for w in start.values()).sqrt() * 1.0001
    else:
        assert all(d.abs().max() <= radius * (start[key].max() - start[key].min()) * 1.0001 for key, d in change.items())
    noise = {key: torch.randn(w.shape, generator=generator()) for key, w in start.items()}
    scale = length / sum(n.square().sum() for n in noise.values()).sqrt()
    at_random = tampering._value(net, {key: start[key] + scale * noise[key] for key in start}, images, labels)
    assert tampering._value(net, found, images, labels) > 2 * at_random


@given(st.integers(1, 500), st.data())
@settings(max_examples=50, deadline=None)
def test_the_bound_is_the_exact_binomial_one(trials, data):
    successes = data.draw(st.integers(0, trials))
    expected = binomtest(successes, trials, alternative="greater").proportion_ci(0.99, "exact").low
    assert tampering.lower_bound(torch.tensor([successes]), trials, 0.01).item() == pytest.approx(expected, abs=1e-9)


def test_the_certificate_of_a_linear_unit_stays_below_its_known_distance():
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False)).double()
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    images = torch.tensor([[[[2.0, 0.0]]], [[[0.0, 3.0]]]], dtype=torch.float64)
    certificate = tampering.certify(net, images, 0.5, 4000, 0.001, "absolute", generator=generator())
    # Both rows get noise, so the margin w.x is 2 with noise of deviation sigma |x| sqrt 2: radius 1 / sqrt 2.
    true = 0.5 * norm.ppf(norm.cdf(1 / (0.5 * 2**0.5)))
    assert certificate.predictions.tolist() == [0, -1]
    assert 0.9 * true < certificate.radii[0] < true
    assert certificate.abstained == 1
    table = certificate.accuracy(torch.tensor([0, 1]), [0.0, 0.1, 5.0])
    assert table.accuracy.tolist() == [0.5, 0.5, 0.0]


def test_attacks_stay_within_each_radius_and_change_no_certified_prediction(net, data):
    images, _ = data.split("validation")
    certificate = tampering.certify(net, images, 0.05, 400, 0.001, generator=generator())
    attacked = tampering.attack_certified(net, images, certificate, steps=5, draws=4, generator=generator())
    assert len(attacked) == (certificate.predictions >= 0).sum() > 20
    assert (attacked.length <= attacked.radius * 1.001).all()
    assert not attacked.violated.any()
    # The attack is one: farther out it does change predictions, and it beats the votes without attack.
    far = tampering.attack_certified(net, images, certificate, 20.0, steps=5, draws=4, generator=generator())
    still = tampering.attack_certified(net, images, certificate, 0.0, steps=1, draws=1, generator=generator())
    assert (far.attacked != far.certified).mean() > 0.5
    assert far.violated.mean() > 0.5
    assert attacked.votes.mean() < still.votes.mean()

def test_a_certificate_takes_its_class_from_the_first_draws_and_its_bound_from_the_others():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 2, bias=False)).double()
    images, others = torch.randn(60, 1, 2, 3, dtype=torch.float64), 0
    certificate = tampering.certify(net, images, 0.5, 205, 0.05, generator=generator(2), chunk=7)
    source, counts, w = generator(2), torch.zeros(2, 60, 2, dtype=torch.long), net[1].weight.detach()
    for draw in range(205):
        moved = w + 0.5 * (w.max() - w.min()) * torch.randn(w.shape, generator=source, dtype=w.dtype)
        counts[int(draw >= 20)] += F.one_hot((images.flatten(1) @ moved.T).argmax(1), 2)
    for image, (first, second) in enumerate(counts.transpose(0, 1)):
        low, highest = (binomtest(int(agreed), 185, alternative="greater").proportion_ci(0.95, "exact").low
                        for agreed in (second[first.argmax()], second.max()))
        assert certificate.predictions[image] == (first.argmax() if low > 0.5 else -1)
        assert certificate.radii[image].item() == pytest.approx(0.5 * norm.ppf(low) if low > 0.5 else 0, abs=1e-6)
        others += highest > 0.5 >= low
    assert 0 < others < certificate.abstained < 60


def test_a_certificate_names_the_tensors_that_it_does_not_cover(net, data):
    flat = copy.deepcopy(net)
    with torch.no_grad():
        flat.get_parameter("1.bias").zero_()
    images = data.split("validation")[0][:3]
    assert tampering.certify(flat, images, 0.05, 40).uncovered == ("1.bias",)
    assert tampering.certify(flat, images, 0.05, 40, scale="absolute").uncovered == ()
    assert tampering.certify(flat, images, 0.05, 40, biases=False).uncovered == ()


def test_outputs_that_are_not_numbers_have_no_vote_after_an_attack_either(net, data):
    images = data.split("validation")[0][:2]
    certificate = tampering.certify(net, images, 0.05, 100, generator=generator())
    start = tampering.trained(net)
    nothing = {name: torch.zeros(2, *w.shape) for name, w in start.items()}
    nothing["1.weight"][1] = float("nan")
    votes = tampering._votes_each(net, start, nothing, images, certificate, 10, generator())
    assert votes.sum(1).tolist() == [10, 0]


def test_without_a_certified_prediction_there_is_nothing_to_attack(net, data):
    images = data.split("validation")[0][:2]
    certificate = tampering.certify(net, images, 0.05, 40)
    none = dataclasses.replace(certificate, predictions=torch.full((2,), -1))
    assert tampering.attack_certified(net, images, none).empty

def test_the_expected_error_is_the_mean_probability_of_other_classes():
    logits, labels = torch.randn(6, 4, generator=generator(), dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2, 0])
    slow = [1 - p[y] for p, y in zip(logits.softmax(1).tolist(), labels.tolist(), strict=True)]
    assert tampering.expected_error(logits, labels).item() == pytest.approx(sum(slow) / len(slow))


def test_a_clipped_margin_is_the_mean_of_each_image_s(net, data):
    images, labels = data.split("validation")
    logits = net(images).detach().double()
    slow = [min(1, max(z[:y] + z[y + 1:]) - z[y]) for z, y in zip(logits.tolist(), labels.tolist(), strict=True)]
    assert tampering.clipped_margin(logits, labels).item() == pytest.approx(sum(slow) / len(slow))


def test_a_margin_still_has_a_slope_where_the_loss_and_the_expected_error_have_none():
    logits, labels = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True), torch.tensor([0])
    slopes = {name: torch.autograd.grad(goal(logits, labels), logits)[0].abs().sum() for name, goal in tampering.GOALS.items()}
    assert slopes["loss"] == slopes["expected error"] == 0
    assert slopes["clipped margin"] > 0


@pytest.mark.parametrize("goal", tampering.GOALS)
def test_both_searches_raise_the_goal_that_they_are_given(net, data, goal):
    images, labels = data.split("validation")
    value = lambda weights: tampering._value(net, weights, images, labels, tampering.GOALS[goal])  # noqa: E731
    before = value(tampering.trained(net))
    assert value(tampering.flip_bits(net, images, labels, 3, goal=tampering.GOALS[goal])[-1][3]) > before
    assert value(tampering.adversary(net, images, labels, 0.05, goal=tampering.GOALS[goal])) > before


def test_searches_take_networks_in_double_precision(net, data):
    images, labels = (part.double() if part.is_floating_point() else part for part in data.split("validation"))
    double = copy.deepcopy(net).double()
    (name, index, bit, weights), = tampering.flip_bits(double, images, labels, 1)
    assert all(w.dtype == torch.float64 for w in weights.values())
    assert (name, index, bit) == tampering.flip_bits(net, images.float(), labels, 1)[0][:3]

@pytest.mark.parametrize("biases", [True, False])
def test_the_adversary_leaves_biases_alone_on_request(net, data, biases):
    found = tampering.adversary(net, *data.split("validation"), 0.1, steps=2, biases=biases)
    assert set(found) == {name for name, p in net.named_parameters() if biases or p.ndim > 1}
    assert all(not torch.equal(w, net.get_parameter(name)) for name, w in found.items())


def test_tensors_that_the_outputs_do_not_depend_on_are_left_alone(net, data):
    class Off(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.unused = copy.deepcopy(net), nn.Linear(4, 4)

        def forward(self, x):
            return self.net(x)

    images, labels = data.split("validation")
    off = Off()
    assert all(name.startswith("net.") for name, *_ in tampering.flip_bits(off, images, labels, 3))
    found = tampering.adversary(off, images, labels, 0.1)
    assert torch.equal(found["unused.weight"], off.unused.weight)
    assert not torch.equal(found["net.1.weight"], off.net.get_parameter("1.weight"))


def test_a_network_whose_outputs_are_not_numbers_is_refused(net, data):
    broken = copy.deepcopy(net)
    with torch.no_grad():
        broken.get_parameter("1.bias").fill_(float("nan"))
    for attack in (lambda: tampering.flip_bits(broken, *data.split("validation"), 1),
                   lambda: tampering.adversary(broken, *data.split("validation"), 0.1)):
        with pytest.raises(ValueError, match="goal is nan"):
            attack()


@pytest.mark.parametrize("call", [
    lambda net, data, images, labels: tampering.curve(net, data, "quantization", [2.7]),
    lambda net, data, images, labels: tampering.curve(net, data, "deletion", []),
    lambda net, data, images, labels: tampering.curve(net, data, "deletion", [0.1], repeats=0),
    lambda net, data, images, labels: tampering.flip_bits(net, images, labels, -1),
    lambda net, data, images, labels: tampering.adversary(net, images, labels, -1),
    lambda net, data, images, labels: tampering.adversary(net, images, labels, 0.1, steps=0),
    lambda net, data, images, labels: tampering.adversary(net, images, labels, 0.1, "l7"),
    *[lambda net, data, images, labels, wrong=wrong: tampering.certify(net, images, **({"sigma": 0.1} | wrong))
      for wrong in ({"sigma": 0}, {"alpha": 1}, {"samples": 3}, {"scale": "mile"}, {"chunk": 0})],
    *[lambda net, data, images, labels, wrong=wrong: tampering.attack_certified(
        net, images, tampering.certify(net, images, 0.1, 20), **wrong)
      for wrong in ({"fraction": -1}, {"steps": 0}, {"draws": 0}, {"samples": 0}, {"chunk": 0})]])
def test_numbers_without_sense_are_refused_by_name(net, data, call):
    with pytest.raises(ValueError, match="use"):
        call(net, data, *(part[:20] for part in data.split("validation")))


def test_losses_of_the_search_are_those_of_evaluation_mode(normalised, data):
    images, labels = data.split("validation")
    normalised.train()
    try:
        tampering.adversary(normalised, images, labels, 0.01, steps=2)
        tampering.flip_bits(normalised, images, labels, 1)
        assert all(module.training for module in normalised.modules())
    finally:
        normalised.eval()
    assert F.cross_entropy(normalised(images), labels).isfinite()


class Shared(nn.Module):
    """A hidden layer that runs twice: called by one name, by two names of one module, or as two modules of one tensor."""

    def __init__(self, names, size=64):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.out = nn.Linear(size, size), nn.Linear(size, 10)
        if names == "two of a module":
            self.b = self.a
        elif names == "two of a tensor":
            self.b = nn.Linear(size, size)
            self.b.weight, self.b.bias = self.a.weight, self.a.bias

    def forward(self, images):
        return self.out(getattr(self, "b", self.a)(torch.tanh(self.a(images.flatten(1)))))


TABLES = {
    "curve": lambda net, data, images, labels: tampering.curve(net, data, "range_noise", [0.05], repeats=4),
    "adversary": lambda net, data, images, labels: tampering.adversary(net, images, labels, 0.05, steps=3),
    "flip_bits": lambda net, data, images, labels: tampering.flip_bits(net, images, labels, 2)[-1][3],
    "certify": lambda net, data, images, labels: tampering.certify(net, images, 0.05, 40, generator=generator()),
}


def assert_same(a, b):
    if isinstance(a, dict):
        assert list(a) == list(b)
        assert all(torch.equal(a[name], b[name]) for name in a)
    elif dataclasses.is_dataclass(a):
        assert torch.equal(a.predictions, b.predictions)
        assert torch.equal(a.radii, b.radii)
    else:
        assert a.equals(b)


@pytest.mark.parametrize("small", [0, tampering.SMALL])
@pytest.mark.parametrize("names", ["two of a module", "two of a tensor"])
@pytest.mark.parametrize("search", TABLES)
def test_a_layer_under_two_names_is_attacked_as_under_one_and_left_as_it_is(data, monkeypatch, search, names, small):
    monkeypatch.setattr(tampering, "SMALL", small)
    net, images = Shared(names), data.split("validation")
    places, before = list(net.parameters()), copy.deepcopy(net.state_dict())
    assert_same(TABLES[search](net, data, *images), TABLES[search](Shared("one"), data, *images))
    assert all(p is place and p.is_leaf for p, place in zip(net.parameters(), places, strict=True))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert net(images[0]).isfinite().all()


class Recurrent(nn.Module):
    """A layer that vmap has no rule for."""

    def __init__(self):
        super().__init__()
        self.rows, self.out = nn.GRU(8, 6, batch_first=True), nn.Linear(6, 10)

    def forward(self, images):
        return self.out(self.rows(images[:, 0])[0][:, -1])


class Branching(nn.Module):
    """A branch that depends on a weight, which vmap cannot follow."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(64, 8), nn.Linear(8, 10)

    def forward(self, images):
        hidden = self.inner(images.flatten(1))
        return self.out(hidden.relu() if self.inner.bias[0].item() > 0 else hidden.tanh())


@pytest.mark.parametrize("make", [Recurrent, Branching])
@pytest.mark.parametrize("search", ["curve", "certify"])
def test_small_networks_that_vmap_cannot_follow_go_through_the_loop(data, monkeypatch, search, make):
    torch.manual_seed(0)
    net, images = make(), data.split("validation")
    found = TABLES[search](net, data, *images)
    monkeypatch.setattr(tampering, "SMALL", 0)
    assert_same(found, TABLES[search](net, data, *images))


def test_certificates_and_attacks_leave_the_global_random_state_alone(net, data):
    images, state = data.split("validation")[0][:5], torch.get_rng_state()
    certificate = tampering.certify(net, images, 0.05, 100)
    assert torch.equal(torch.get_rng_state(), state)
    tampering.attack_certified(net, images, certificate, steps=1, draws=1, samples=10)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("goal", tampering.GOALS)
def test_searches_take_a_goal_by_its_name(net, data, goal):
    images, labels = data.split("validation")
    assert_same(tampering.adversary(net, images, labels, 0.05, steps=3, goal=goal),
                tampering.adversary(net, images, labels, 0.05, steps=3, goal=tampering.GOALS[goal]))
    assert_same(tampering.flip_bits(net, images, labels, 1, goal=goal)[0][3],
                tampering.flip_bits(net, images, labels, 1, goal=tampering.GOALS[goal])[0][3])


@pytest.mark.parametrize("search", [tampering.adversary, tampering.flip_bits])
def test_an_unknown_goal_is_named_with_the_known_ones(net, data, search):
    with pytest.raises(ValueError, match="unknown goal 'fame': use one of loss, expected error, clipped margin"):
        search(net, *data.split("validation"), 1, goal="fame")


def test_searches_refuse_gradient_checkpointing_which_would_compute_again_at_other_weights(data):
    class Checkpointed(Shared):
        def forward(self, images):
            return self.out(checkpoint(lambda x: torch.tanh(self.a(x)), images.flatten(1), use_reentrant=False))

    for search in (tampering.adversary, tampering.flip_bits):
        with pytest.raises(ValueError, match="turn gradient checkpointing off"):
            search(Checkpointed("one"), *data.split("validation"), 1)
