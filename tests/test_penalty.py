"""The penalties against slow oracles: sums over images and classes in float64, explicit steps, training runs."""

import copy
import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fishlib import codec, nets, penalty, tampering
from fishlib.data import ImageData
from fishlib.training import fit

THREATS = {"isotropic": penalty.isotropic, "range_noise": penalty.range_noise, "relative_noise": penalty.relative_noise,
           "both": lambda w: penalty.range_noise(w) + 0.3 * penalty.relative_noise(w)}


class Tied(nn.Module):
    """One weight in two layers: squares of sums, not sums of squares."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, images):
        return self.head(self.inner(torch.tanh(self.inner(images.flatten(1)))))


class Joined(nn.Module):
    """One weight as such and once more in a list of tensors."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(16, 8, bias=False), nn.Linear(8, 3)

    def forward(self, images):
        rows = images.flatten(1)
        return self.head(torch.tanh(self.inner(rows) + rows @ torch.cat([self.inner.weight]).T))


class Tokens(nn.Module):
    """A linear layer on several rows of each image: their number need not be the number of images."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(8, 3), nn.Linear(3, 3)

    def forward(self, images):
        rows = self.embed(images.reshape(-1, 2, 8).flatten(0, 1))
        return self.head(torch.tanh(rows.view(len(images), 2, 3)).mean(1))


def networks():
    torch.manual_seed(0)
    shape = (1, 4, 4)
    return {
        "mlp": nets.mlp(shape, 3, (8,)),
        "overwritten": nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)),
        "convolution": nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3, bias=False)),
        "tied": Tied(),
        "joined": Joined(),
        "normalised": nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).eval(),
        "tokens": Tokens(),
        "batch statistics": nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)),
    }


def batch(count=6, classes=3):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(count, 1, 4, 4, generator=generator, dtype=torch.float64),
            torch.randint(classes, (count,), generator=generator))


def exact_trace(net, images, threat):
    """Mean over images and sum over classes of p(c) sum_i S_i g_i^2, one image and class at a time."""
    parameters, total = list(net.parameters()), 0.0
    for logp in net(images).log_softmax(1):  # together, since batch statistics belong to all of them
        for c in range(len(logp)):
            score = torch.autograd.grad(logp[c], parameters, retain_graph=True, create_graph=True)
            total = total + logp[c].exp() * sum((threat(p) * g.square()).sum()
                                                for p, g in zip(parameters, score, strict=True))
    return total / len(images)


@pytest.mark.parametrize("threat", THREATS)
@pytest.mark.parametrize("name", networks())
def test_the_trace_is_unbiased_within_four_standard_errors(name, threat):
    net, (images, _) = networks()[name].double(), batch()
    generator = torch.Generator().manual_seed(2)
    draws = torch.stack([sum(penalty.fisher_trace(net, images, THREATS[threat], generator=generator).values()).detach()
                         for _ in range(150)])
    expected = exact_trace(net, images, THREATS[threat]).detach()
    assert (draws.mean() - expected).abs() < 4 * draws.std() / len(draws) ** 0.5


def test_only_linear_layers_in_front_of_batch_statistics_lose_the_closed_form():
    net, (images, _) = networks()["batch statistics"].double(), batch()

    def deviations(net):
        torch.manual_seed(2)
        draws = [penalty.fisher_trace(net, images) for _ in range(50)]
        return {name: torch.stack([draw[name].detach() for draw in draws]).std().item() for name in draws[0]}

    trained, fixed = deviations(net.train()), deviations(net.eval())
    assert trained["1.weight"] > 3 * fixed["1.weight"]


def signed_residuals(net, images, seed):
    """(diag s - p s^T) e with s = sqrt p, written with matrices, for the signs of one seed."""
    p = net(images).softmax(1)
    signs = torch.randint(2, p.shape, generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    return torch.stack([(row.sqrt().diag() - row.outer(row.sqrt())) @ e for row, e in zip(p, signs, strict=True)])


def test_linear_layers_sum_squares_of_single_images_and_their_gradient_is_exact():
    net, (images, _) = networks()["mlp"].double(), batch()
    traces = penalty.fisher_trace(net, images, "relative_noise", generator=torch.Generator().manual_seed(3))
    expected = 0.0
    for image, r in zip(images, signed_residuals(net, images, 3), strict=True):
        score = torch.autograd.grad(net(image[None]), list(net.parameters()), r[None], create_graph=True)
        expected = expected + sum((p.square() * g.square()).sum() for p, g in zip(net.parameters(), score, strict=True))
    ours, theirs = sum(traces.values()), expected / len(images)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, list(net.parameters())),
                    torch.autograd.grad(theirs, list(net.parameters())), strict=True):
        torch.testing.assert_close(a, b)


def test_the_residuals_have_the_covariance_of_drawn_labels():
    p = torch.tensor([0.7, 0.2, 0.1 - 1e-40, 1e-40], dtype=torch.float64)
    draws = penalty._residuals(p.log().expand(100_000, -1), torch.Generator().manual_seed(0))
    covariance = draws.T @ draws / len(draws)
    torch.testing.assert_close(covariance, p.diag() - p.outer(p), rtol=0, atol=5e-3)
    torch.testing.assert_close(draws.mean(0), torch.zeros(4).double(), rtol=0, atol=5e-3)


@pytest.mark.parametrize("threat", THREATS)
@pytest.mark.parametrize("name", networks())
def test_the_gradient_of_the_trace_is_unbiased_within_four_standard_errors(name, threat):
    net, (images, _) = networks()[name].double(), batch()
    parameters, generator = list(net.parameters()), torch.Generator().manual_seed(2)

    def gradient(value):
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)])

    expected = gradient(exact_trace(net, images, THREATS[threat]))
    draws = torch.stack([gradient(sum(penalty.fisher_trace(net, images, THREATS[threat], generator=generator).values()))
                         for _ in range(300)])
    others = torch.randn(len(expected), 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for direction in (expected, *others.T):  # along the gradient, and along others
        along = draws @ direction
        assert (along.mean() - expected @ direction).abs() < 4 * along.std() / len(along) ** 0.5


def test_with_held_confidence_the_value_stays_and_the_gradient_is_that_through_the_scores_alone():
    net, (images, _) = networks()["mlp"].double(), batch()

    def draw(held):
        generator = torch.Generator().manual_seed(3)
        return sum(penalty.fisher_trace(net, images, "range_noise", generator=generator, held=held).values())

    torch.testing.assert_close(draw(True), draw(False))
    expected = 0.0
    for image, r in zip(images, signed_residuals(net, images, 3).detach(), strict=True):
        score = torch.autograd.grad(net(image[None]), list(net.parameters()), r[None], create_graph=True)
        expected = expected + sum((penalty.range_noise(p) * g.square()).sum()
                                  for p, g in zip(net.parameters(), score, strict=True)) / len(images)
    theirs = torch.autograd.grad(expected, list(net.parameters()))
    for a, b in zip(torch.autograd.grad(draw(True), list(net.parameters())), theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(torch.autograd.grad(draw(False), net[1].weight)[0], theirs[0])


def test_the_penalty_with_held_confidence_takes_that_gradient():
    net, (images, labels) = networks()["mlp"].double(), batch()

    def gradient(chosen):
        torch.manual_seed(4)
        return torch.autograd.grad(chosen(net, images, labels, net(images)), net[1].weight)[0]

    torch.manual_seed(4)
    traces = penalty.fisher_trace(net, images, "range_noise", held=True)
    torch.testing.assert_close(gradient(penalty.FisherTrace(0.1, share=1.0, held=True)),
                               torch.autograd.grad(0.1 * sum(traces.values()), net[1].weight)[0])
    torch.testing.assert_close(gradient(penalty.named("fisher_held", 0.1)), gradient(penalty.FisherTrace(0.1, held=True)))
    torch.testing.assert_close(gradient(penalty.named("fisher_held_sum", 0.1)),
                               gradient(penalty.FisherTrace(0.1, penalty.range_and_relative, held=True)))


def test_the_divergence_for_both_threats_is_that_to_a_copy_changed_by_both():
    net, (images, labels) = networks()["mlp"].double(), batch()

    def value(chosen):
        torch.manual_seed(4)
        return chosen(net, images, labels, net(images))

    both = value(penalty.KLNoise(0.1, threat=penalty.range_and_relative))
    torch.testing.assert_close(value(penalty.named("kl_sum", 0.1)), both)
    assert both != value(penalty.named("kl_noise", 0.1))


def test_frozen_and_one_dimensional_tensors_are_left_out_on_request():
    net, (images, _) = networks()["mlp"].double(), batch()
    net[1].weight.requires_grad_(False)
    assert set(penalty.fisher_trace(net, images)) == {"1.bias", "3.weight", "3.bias"}
    assert set(penalty.fisher_trace(net, images, biases=False)) == {"3.weight"}


@pytest.mark.parametrize("threat", ["isotropic", "range_noise", "relative_noise"])
def test_divergence_from_small_noise_is_half_the_trace(threat):
    net, (images, labels) = networks()["mlp"].double(), batch()
    sigma, term = 1e-3, penalty.KLNoise(1.0, 1e-3, threat)
    torch.manual_seed(4)
    draws = torch.stack([term(net, images, labels, net(images)).detach() for _ in range(400)])
    expected = sigma**2 / 2 * exact_trace(net, images, THREATS[threat]).detach()
    assert (draws.mean() - expected).abs() < 4 * draws.std() / len(draws) ** 0.5


def test_quantisation_is_range_noise_of_its_rounding_error():
    weight = torch.linspace(-1, 3, 100_001, dtype=torch.float64)
    measured = (penalty.round_to(3)(weight) - weight).square().mean()
    torch.testing.assert_close(penalty.quantization(3)(weight), measured, rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape", [(5,), (4, 7), (3, 2, 3, 3)])
def test_the_range_and_its_gradient_are_those_of_maximum_and_minimum(shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    ours, expected = penalty.range_noise(w), (w.max() - w.min()).square()
    assert torch.equal(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours, w), torch.autograd.grad(expected, w))


def test_the_range_form_does_not_change_with_the_scale_of_a_normalised_layer():
    net, (images, _) = networks()["normalised"].double().train(), batch()

    def value(net):
        generator = torch.Generator().manual_seed(5)
        return sum(penalty.fisher_trace(net, images, "range_noise", biases=False, generator=generator).values())

    before = value(net)
    with torch.no_grad():
        net[0].weight *= 10
        net[0].bias *= 10
    torch.testing.assert_close(value(net), before, rtol=1e-3, atol=0)


EACH = {
    "fisher_trace": penalty.FisherTrace(0.1), "kl_noise": penalty.KLNoise(0.1), "l2": penalty.L2(0.1),
    "gradient_norm": penalty.GradientNorm(0.1, share=0.5), "sam": penalty.SAM(), "noise": penalty.NoisyWeights(0.1),
    "deletion": penalty.NoisyWeights(0.3, "deletion"), "rounding": penalty.QuantizationAware(2),
}


def of_name(name, strength, **more):
    """`penalty.named`, with bits where the number of the penalty is no strength."""
    return penalty.named(name, 2 if name == "rounded_weights" else strength, **more)


@pytest.mark.parametrize("name", EACH)
def test_a_penalty_leaves_weights_statistics_modes_and_gradients_as_they_are(name):
    net, (images, labels) = networks()["normalised"].double().train(), batch()
    net[1].eval()
    logits, before = net(images), copy.deepcopy(net.state_dict())
    net[1].train()
    value = (EACH[name].objective(net, images, labels, logits, F.cross_entropy) if hasattr(EACH[name], "objective")
             else EACH[name](net, images, labels, logits))
    assert value.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(module.training for module in net.modules())
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("name", ["l2", "sam", "weight_noise", "weight_deletion", "gradient_norm", "kl_noise", "fisher_trace"])
def test_without_biases_a_penalty_is_that_of_frozen_biases(name):
    def value(chosen, net):
        torch.manual_seed(0)
        if hasattr(chosen, "objective"):
            return chosen.objective(net, images, labels, net(images), F.cross_entropy)
        return chosen(net, images, labels, net(images))

    net, (images, labels) = networks()["mlp"].double(), batch()
    frozen = copy.deepcopy(net)
    frozen[1].bias.requires_grad_(False)
    frozen[3].bias.requires_grad_(False)
    with_all, without = penalty.named(name, 0.1), penalty.named(name, 0.1, biases=False)
    torch.testing.assert_close(value(without, net), value(with_all, frozen))
    assert not torch.equal(value(without, net), value(with_all, net))


@pytest.mark.parametrize("name", ["fisher_weighted", "fisher_quantization"])
def test_without_biases_a_decoupled_step_leaves_them_to_the_optimizer(name):
    one_batch = ImageData("digits", batch_size=230, limit=256, device="cpu")
    options = {"epochs": 1, "lr": 0.01, "schedule": "constant"}
    plain, _ = fit(small(one_batch), one_batch, **options)
    ours, _ = fit(small(one_batch), one_batch, penalty=penalty.named(name, 10.0, biases=False), **options)
    assert torch.equal(ours[1].bias, plain[1].bias)
    assert not torch.equal(ours[1].weight, plain[1].weight)


class TwoNames(Tied):
    """`Tied` with a second name for its inner layer: of the module, or of its tensors."""

    def __init__(self, of):
        super().__init__()
        self.again = self.inner if of == "module" else nn.Linear(16, 16)
        self.again.weight, self.again.bias = self.inner.weight, self.inner.bias

    def forward(self, images):
        return self.head(self.again(torch.tanh(self.inner(images.flatten(1)))))


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("of", ["module", "tensors"])
def test_a_layer_under_two_names_is_penalised_as_under_one_and_left_as_it_is(of, name):
    def gradients(net):
        torch.manual_seed(7)
        value = (EACH[name].objective(net, images, labels, net(images), F.cross_entropy) if hasattr(EACH[name], "objective")
                 else EACH[name](net, images, labels, net(images)))
        return torch.autograd.grad(value, list(net.parameters()), materialize_grads=True, allow_unused=True)

    net, plain, (images, labels) = TwoNames(of).double(), Tied().double(), batch()
    plain.load_state_dict(net.state_dict(), strict=False)
    places, before = list(net.parameters()), copy.deepcopy(net.state_dict())
    for a, b in zip(gradients(net), gradients(plain), strict=True):
        torch.testing.assert_close(a, b)
    assert all(p is place and p.is_leaf for p, place in zip(net.parameters(), places, strict=True))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


class Checkpointed(Tied):
    def forward(self, images):
        return self.head(checkpoint(lambda x: torch.tanh(self.inner(x)), images.flatten(1), use_reentrant=False))


@pytest.mark.parametrize("name", ["sam", "weight_noise", "weight_deletion", "rounded_weights", "kl_noise"])
def test_gradient_checkpointing_is_refused_where_it_would_compute_again_at_other_weights(name):
    net, (images, labels), chosen = Checkpointed().double(), batch(), of_name(name, 0.1)
    logits = net(images)
    with pytest.raises(ValueError, match="turn gradient checkpointing off"):
        (chosen.objective(net, images, labels, logits, F.cross_entropy) if hasattr(chosen, "objective")
         else chosen(net, images, labels, logits))


def test_the_trace_of_a_network_without_trained_parameters_is_refused_by_name():
    net, (images, _) = networks()["mlp"].double(), batch()
    net[1].weight.requires_grad_(False)
    net[3].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the network requires gradients and has two dimensions"):
        penalty.fisher_trace(net, images, biases=False)
    with pytest.raises(ValueError, match="no parameter of the network requires gradients: call requires_grad_"):
        penalty.fisher_trace(net.requires_grad_(False), images)


@pytest.mark.parametrize("name", ["l2", "sam", "weight_noise", "weight_deletion", "rounded_weights", "gradient_norm",
                                  "kl_noise", "fisher_trace", "fisher_quantization"])
def test_a_penalty_with_nothing_to_act_on_is_refused_by_name(digits, name):
    net, term = small(digits), of_name(name, 1e-2, biases=False)
    for layer in (net[1], net[3]):
        layer.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the network requires gradients and has two dimensions or more"):
        fit(net, digits, epochs=1, penalty=term)


def test_the_trace_of_no_images_is_refused():
    net, (images, _) = networks()["mlp"].double(), batch()
    with pytest.raises(ValueError, match="there are no images"):
        penalty.fisher_trace(net, images[:0])


def test_the_trace_is_the_same_where_gradients_are_switched_off():
    net, (images, _) = networks()["mlp"].double(), batch()
    expected = penalty.fisher_trace(net, images, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = penalty.fisher_trace(net, images, generator=torch.Generator().manual_seed(0))
    assert {name: trace.item() for name, trace in found.items()} == {name: trace.item() for name, trace in expected.items()}


def test_gradient_norm_is_that_of_the_mean_loss():
    net, (images, labels) = networks()["convolution"].double(), batch()
    value = penalty.GradientNorm(2.0)(net, images, labels, net(images))
    F.cross_entropy(net(images), labels).backward()
    torch.testing.assert_close(value.detach(), 2 * sum(p.grad.square().sum() for p in net.parameters()))


def test_sam_takes_the_gradient_uphill():
    net, (images, labels) = networks()["convolution"].double(), batch()
    value = penalty.SAM(0.05).objective(net, images, labels, net(images), F.cross_entropy)
    ours = torch.autograd.grad(value, list(net.parameters()))
    F.cross_entropy(net(images), labels).backward()
    length = sum(p.grad.square().sum() for p in net.parameters()).sqrt()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.05 * p.grad / length
    theirs = torch.autograd.grad(F.cross_entropy(net(images), labels), list(net.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("threat", ["range_noise", "deletion"])
def test_training_at_noisy_weights_uses_the_gradient_there(threat):
    net, (images, labels) = networks()["mlp"].double(), batch()
    torch.manual_seed(6)
    value = penalty.NoisyWeights(0.2, threat).objective(net, images, labels, net(images), F.cross_entropy)
    ours = torch.autograd.grad(value, list(net.parameters()))
    torch.manual_seed(6)
    masks = []
    with torch.no_grad():
        for p in net.parameters():
            masks.append(torch.rand_like(p) >= 0.2 if threat == "deletion" else torch.ones_like(p))
            p.copy_(p * masks[-1] if threat == "deletion" else p + 0.2 * (p.max() - p.min()) * torch.randn_like(p))
    theirs = torch.autograd.grad(F.cross_entropy(net(images), labels), list(net.parameters()))
    for a, b, mask in zip(ours, theirs, masks, strict=True):
        torch.testing.assert_close(a, b * mask)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("name", ["mlp", "convolution"])
def test_training_at_rounded_weights_applies_the_gradient_there_to_the_weights(name, biases):
    net, (images, labels) = networks()[name].double(), batch()
    term = penalty.QuantizationAware(2, biases=biases)
    ours = torch.autograd.grad(term.objective(net, images, labels, net(images), F.cross_entropy), list(net.parameters()))
    with torch.no_grad():
        for p in net.parameters():
            if biases or p.ndim > 1:
                low, high = min(p.flatten().tolist()), max(p.flatten().tolist())
                levels = [low + (high - low) * level / 3 for level in range(4)]
                nearest = [min(levels, key=lambda q, w=w: abs(w - q)) for w in p.flatten().tolist()]
                p.copy_(torch.tensor(nearest, dtype=p.dtype).view_as(p))
    theirs = torch.autograd.grad(F.cross_entropy(net(images), labels), list(net.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_weights_are_rounded_in_training_as_in_a_measurement_that_leaves_biases_out():
    net, (images, labels) = networks()["mlp"].double(), batch()
    with tampering.perturb(net, "quantization", 3, biases=False):
        expected = F.cross_entropy(net(images), labels).item()
    term = penalty.named("rounded_weights", 3.0)
    assert term.objective(net, images, labels, net(images), F.cross_entropy).item() == pytest.approx(expected)
    assert "bits=3," in repr(term)


def test_a_network_trained_at_rounded_weights_keeps_its_accuracy_when_rounded(digits):
    def loss(net):
        images, labels = digits.split("validation")
        with tampering.perturb(net, "quantization", 2, biases=False), torch.no_grad():
            return F.cross_entropy(net(images), labels).item()

    plain, _ = fit(small(digits), digits, epochs=20, lr=0.01)
    aware, _ = fit(small(digits), digits, epochs=20, lr=0.01, penalty=penalty.QuantizationAware(2))
    assert loss(aware) < 0.7 * loss(plain)


def test_distillation_by_name_has_its_temperature_and_a_hotter_one():
    net, (images, labels) = networks()["mlp"].double(), batch()
    teacher = nets.mlp((1, 4, 4), 3, (8,)).double()
    for name, temperature in (("distillation", 4.0), ("distillation_hot", 20.0)):
        value = penalty.named(name, 0.3, teacher=teacher)(net, images, labels, net(images))
        expected = penalty.Distillation(0.3, teacher, temperature)(net, images, labels, net(images))
        torch.testing.assert_close(value, expected)


def test_distillation_is_the_softened_divergence_from_the_teacher_times_the_squared_temperature():
    net, (images, labels) = networks()["mlp"].double(), batch()
    teacher = nets.mlp((1, 4, 4), 3, (8,)).double()
    value = penalty.Distillation(0.3, teacher, temperature=2.0)(net, images, labels, net(images))
    expected = 0.0
    for p, q in zip(*((one(images) / 2).softmax(1).tolist() for one in (teacher, net)), strict=True):
        expected += 0.3 * 4 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / len(images)
    assert value.item() == pytest.approx(expected)


def test_the_divergence_of_noise_is_that_of_the_changed_network_from_this_one():
    net, (images, labels) = networks()["mlp"].double(), batch()
    torch.manual_seed(3)
    value = penalty.KLNoise(2.0, sigma=0.5)(net, images, labels, net(images)).item()
    torch.manual_seed(3)
    other = copy.deepcopy(net)
    with torch.no_grad():
        for w in other.parameters():
            w += 0.5 * (w.max() - w.min()) * torch.randn_like(w)
    expected = 0.0
    for p, q in zip(*(one(images).softmax(1).tolist() for one in (net, other)), strict=True):
        expected += 2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / len(images)
    assert value == pytest.approx(expected)


def test_the_trace_of_a_share_is_the_mean_over_the_first_images():
    net, (images, labels) = networks()["convolution"].double(), batch()
    values = []
    for term, some in ((penalty.FisherTrace(1.0, share=0.5), images), (penalty.FisherTrace(1.0, share=1.0), images[:3])):
        torch.manual_seed(0)
        values.append(term(net, some, labels[: len(some)], net(some)).item())
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_noise_whose_size_counts_adds_the_slope_through_its_unit():
    net, (images, labels) = networks()["mlp"].double(), batch()
    torch.manual_seed(6)
    value = penalty.NoisyWeights(0.2, through=True).objective(net, images, labels, net(images), F.cross_entropy)
    ours = torch.autograd.grad(value, list(net.parameters()))
    torch.manual_seed(6)
    moved = {name: p + 0.2 * (p.max() - p.min()) * torch.randn_like(p) for name, p in net.named_parameters()}
    loss = F.cross_entropy(torch.func.functional_call(net, moved, (images,)), labels)
    for a, b in zip(ours, torch.autograd.grad(loss, list(net.parameters())), strict=True):
        torch.testing.assert_close(a, b)


def test_distillation_vanishes_at_the_teacher_and_never_changes_it():
    net, (images, labels) = networks()["normalised"].double(), batch()
    teacher = copy.deepcopy(net).train()
    before = copy.deepcopy(teacher.state_dict())
    value = penalty.Distillation(1.0, teacher)(net, images, labels, net(images))
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert teacher.training
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


@pytest.mark.parametrize("make", [penalty.SAM, lambda **schedule: penalty.NoisyWeights(0.3, **schedule),
                                  lambda **schedule: penalty.QuantizationAware(2, **schedule)])
def test_training_at_other_weights_follows_a_schedule_without_growing_its_radius(make):
    net, (images, labels) = networks()["mlp"].double(), batch()

    def loss(step, **schedule):
        term = make(**schedule)
        term.steps, term.step = 80, step
        torch.manual_seed(7)
        return term.objective(net, images, labels, net(images), F.cross_entropy).item()

    plain = F.cross_entropy(net(images), labels).item()
    assert loss(1, every=4) == loss(0, warmup=0.5) == plain
    assert loss(4, every=4) == loss(40, warmup=0.5) == loss(4)
    assert abs(loss(1, warmup=0.5) - plain) < abs(loss(4) - plain)


def test_the_schedule_keeps_the_mean_strength_and_rises_from_zero():
    term = penalty.L2(0.5, every=4, warmup=0.5)
    term.steps = 80
    strengths = []
    for term.step in range(80):
        strengths.append(term.current_strength())
    assert strengths[0] == 0
    assert strengths[20] == pytest.approx(0.5 * 4 / 2)
    assert sum(strengths[40:]) / 40 == pytest.approx(0.5)
    assert not any(strengths[1:4])


BAD = {
    "strength": [lambda: penalty.L2(-1), lambda: penalty.L2(float("nan")), lambda: penalty.L2(float("inf"))],
    "every": [lambda: penalty.L2(1, every=0), lambda: penalty.L2(1, every=1.5)],
    "warmup": [lambda: penalty.L2(1, warmup=2)],
    "threat": [lambda: penalty.FisherTrace(1, "wind")],
    "share": [lambda: penalty.FisherTrace(1, share=0), lambda: penalty.GradientNorm(1, share=1.5)],
    "source": [lambda: penalty.FisherWeighted(1, "tea leaves")],
    "refresh": [lambda: penalty.FisherWeighted(1, "diagonal", 0)],
    "bits": [lambda: penalty.quantization(0), lambda: penalty.round_to(0), lambda: penalty.round_to(2.5),
             lambda: penalty.QuantizationAware(33), lambda: penalty.named("rounded_weights", 0.5)],
    "temperature": [lambda: penalty.Distillation(1, nn.Flatten(), temperature=0)],
    "sigma": [lambda: penalty.KLNoise(1, sigma=0), lambda: penalty.KLNoise(1, sigma=-0.1)],
    "rho": [lambda: penalty.SAM(-1)],
    "amount": [lambda: penalty.NoisyWeights(2, "deletion"), lambda: penalty.NoisyWeights(-0.1)],
    "decay": [lambda: penalty.FisherQuantization(decay=2)],
    "constant": [lambda: penalty.FisherQuantization(constant=-1)],
    "penalty": [lambda: penalty.named("prayer", 1)],
    "teacher": [lambda: penalty.named("distillation", 1), lambda: penalty.named("distillation_hot", 1)],
}


@pytest.mark.parametrize(("name", "make"), [(name, make) for name, makes in BAD.items() for make in makes])
def test_a_bad_value_is_named_with_the_good_ones(name, make):
    with pytest.raises(ValueError, match=rf"{name}.*(use|it is a share|give)"):
        make()


@pytest.fixture(scope="module")
def digits():
    return ImageData("digits", batch_size=64, limit=256, device="cpu")


def small(data):
    torch.manual_seed(0)
    return nets.mlp(data.shape, data.num_classes, (16,))


@pytest.mark.parametrize("name", [name for name in penalty.NAMES if name != "none"])
@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_every_penalty_trains(digits, name, optimizer):
    net = small(digits)
    chosen = of_name(name, 1e-2, teacher=net)
    _, history = fit(net, digits, epochs=10, lr=0.03, optimizer=optimizer, penalty=chosen)
    assert history.validation_accuracy.iloc[-1] > 0.5


def test_penalties_of_the_loss_work_with_any_optimizer_and_one_of_adam_says_what_it_needs(digits):
    fit(small(digits), digits, epochs=1, optimizer="sgd", penalty=penalty.FisherTrace(1e-3))
    fit(small(digits), digits, epochs=1, optimizer="sgd", penalty=penalty.FisherQuantization())
    with pytest.raises(ValueError, match="keeps no second moments"):
        fit(small(digits), digits, epochs=1, optimizer="sgd", penalty=penalty.FisherWeighted(1.0))


@pytest.mark.parametrize("source", ["adam", "diagonal"])
def test_a_group_of_frozen_parameters_is_passed_over(digits, source):
    def make(net):
        net[1].requires_grad_(False)
        return torch.optim.Adam([{"params": net[1].parameters()}, {"params": net[3].parameters()}], 1e-2)

    net = small(digits)
    trained, _ = fit(net, digits, epochs=1, optimizer=make, penalty=penalty.FisherWeighted(1.0, source))
    assert torch.equal(trained[1].weight, net[1].weight)
    assert not torch.equal(trained[3].weight, net[3].weight)


def test_weights_that_the_optimizer_does_not_hold_are_not_pulled(digits):
    net = small(digits)
    trained, _ = fit(net, digits, epochs=1, optimizer=lambda net: torch.optim.Adam(net[3].parameters(), 1e-2),
                     penalty=penalty.FisherQuantization(1.0))
    assert torch.equal(trained[1].weight, net[1].weight)


def test_a_decay_that_enters_the_moments_of_adam_is_refused(digits):
    with pytest.raises(ValueError, match=r"Adam adds weight_decay=0.1 .* use optimizer='adamw'"):
        fit(small(digits), digits, epochs=1, weight_decay=0.1, penalty=penalty.FisherWeighted(1.0))


@pytest.mark.parametrize("name", [name for name in penalty.NAMES if name != "none"])
def test_every_penalty_trains_in_bfloat16(digits, name):
    torch.manual_seed(0)
    net = nets.small_cnn(10, digits.shape, width=4)
    _, history = fit(net, digits, epochs=2, precision="bfloat16", penalty=of_name(name, 1e-3, teacher=net))
    assert history.train_loss.iloc[-1] < history.train_loss.iloc[0]


class Spare(nn.Module):
    """A network with a layer that is switched off, and one behind it that stays out of the outputs."""

    def __init__(self, data):
        super().__init__()
        self.used, self.unused, self.ignored = small(data), nn.Linear(4, 4), nn.Linear(64, 4)

    def forward(self, images):
        self.ignored(images.flatten(1))
        return self.used(images)


@pytest.mark.parametrize("name", [name for name in penalty.NAMES if name != "none"])
def test_parameters_that_the_outputs_do_not_depend_on_get_no_penalty(digits, name):
    torch.manual_seed(0)
    net = Spare(digits)
    trained, _ = fit(net, digits, epochs=1, penalty=of_name(name, 1e-2, teacher=net))
    assert not torch.equal(trained.used[1].weight, net.used[1].weight)
    if name not in ("l2", "kl_noise", "weight_noise", "weight_deletion", "sam"):
        assert torch.equal(trained.unused.weight, net.unused.weight)


class Step(nn.Module):
    """A training step as the forward of a module, which is how the trainer hands it to DistributedDataParallel."""

    def __init__(self, net, term):
        super().__init__()
        self.net, self.term = net, term

    def forward(self, images, labels):
        logits = self.net(images)
        if hasattr(self.term, "objective"):
            return self.term.objective(self.net, images, labels, logits, F.cross_entropy)
        return F.cross_entropy(logits, labels) + self.term(self.net, images, labels, logits)


def gradients_of_rank(rank, file, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    images, labels = batch(8)
    part = slice(4 * rank, 4 * rank + 4)
    for name in ("fisher_trace", "gradient_norm", "sam"):
        step = nn.parallel.DistributedDataParallel(Step(networks()["mlp"].double(), EACH[name]))
        torch.manual_seed(rank)
        step(images[part], labels[part]).backward()
        torch.save([p.grad for p in step.parameters()], f"{folder}/{name}-{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_average_the_gradients_of_loss_and_penalty(tmp_path):
    torch.multiprocessing.spawn(gradients_of_rank, (str(tmp_path / "meet"), str(tmp_path)), nprocs=2)
    images, labels = batch(8)
    for name in ("fisher_trace", "gradient_norm", "sam"):
        alone = []
        for rank in range(2):
            part, step = slice(4 * rank, 4 * rank + 4), Step(networks()["mlp"].double(), EACH[name])
            torch.manual_seed(rank)
            alone.append(torch.autograd.grad(step(images[part], labels[part]), list(step.parameters())))
        for rank in range(2):
            for ours, first, second in zip(torch.load(tmp_path / f"{name}-{rank}"), *alone, strict=True):
                torch.testing.assert_close(ours, (first + second) / 2)


# Lightning starts the second process by running the script again, so this has to be a file of its own.
TWO_DEVICES = """
import sys, torch
from fishlib import nets, penalty
from fishlib.data import ImageData
from fishlib.training import fit

PENALTIES = {"adam": lambda: penalty.FisherWeighted(20.0), "sgd": lambda: penalty.FisherQuantization(100.0),
             "adamw": lambda: penalty.FisherWeighted(20.0, "diagonal")}

def trained(optimizer, given, devices):
    torch.manual_seed(0)
    data = ImageData("digits", batch_size=32 // devices, limit=256, device="cpu")
    net, _ = fit(nets.mlp((1, 8, 8), 10, (16,)), data, epochs=1, optimizer=optimizer, lr=0.01, precision="float32",
                 devices=devices, penalty=PENALTIES[optimizer]() if given else None)
    return torch.cat([p.detach().flatten() for p in net.parameters()])

if __name__ == "__main__":
    torch.set_num_threads(1)
    cases = [(optimizer, given) for optimizer in PENALTIES for given in (True, False)]
    found = {"one": [trained(*case, 1) for case in cases], "two": [trained(*case, 2) for case in cases]}
    torch.save(found, f"{sys.argv[1]}-{torch.distributed.get_rank()}")
"""


def test_two_devices_train_as_one_does_on_batches_of_twice_the_size(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_DEVICES)
    subprocess.run([sys.executable, str(script), str(tmp_path / "weights")], check=True, cwd=tmp_path, timeout=300,
                   env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True)
    first, second = (torch.load(tmp_path / f"weights-{rank}") for rank in range(2))
    torch.testing.assert_close(first["two"], second["two"], rtol=0, atol=0)
    for case, (one, two) in enumerate(zip(first["one"], first["two"], strict=True)):
        if case != 4:  # "diagonal" draws its labels, other ones in the two processes
            assert (two - one).norm() < 1e-5 * one.norm(), case
    for case in (0, 2, 4):  # and the penalties did something
        assert (first["two"][case] - first["two"][case + 1]).norm() > 1e-3 * first["two"][case].norm(), case


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_the_weighted_form_is_a_proximal_step_that_never_enters_the_moments(digits, optimizer):
    batches = ImageData("digits", batch_size=230, limit=256, device="cpu")  # one batch an epoch
    seen = {}

    class Keep(torch.optim.Adam if optimizer == "adam" else torch.optim.AdamW):
        def step(self, closure=None):
            loss = super().step(closure)
            seen["weights"] = [p.detach().clone() for p in self.param_groups[0]["params"]]
            seen["moments"] = [self.state[p]["exp_avg_sq"].clone() for p in self.param_groups[0]["params"]]
            return loss

    def make(net):
        return Keep(net.parameters(), 1e-2, weight_decay=0.1 if optimizer == "adamw" else 0)

    fit(small(batches), batches, epochs=3, optimizer=make, schedule="constant")
    plain = seen.copy()
    net, _ = fit(small(batches), batches, epochs=1, optimizer=make, schedule="constant", penalty=penalty.FisherWeighted(5.0))
    for p, w, v in zip(net.parameters(), seen["weights"], seen["moments"], strict=True):
        torch.testing.assert_close(p.detach(), w / (1 + 2 * 1e-2 * 5.0 * 230 * v / (1 - 0.999)))
    # Were the penalty part of the loss, an infinitesimal one would not do and a large one would show in v.
    fit(small(batches), batches, epochs=1, optimizer=make, schedule="constant")
    bare = seen.copy()
    fit(small(batches), batches, epochs=1, optimizer=make, schedule="constant", penalty=penalty.FisherWeighted(1e4))
    assert all(torch.equal(a, b) for a, b in zip(bare["moments"], seen["moments"], strict=True))
    assert plain["weights"][0].shape == bare["weights"][0].shape


def test_the_weighted_form_with_a_quantiser_goes_to_its_levels_by_the_same_proximal_step(digits):
    net = small(digits)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    F.cross_entropy(net(digits.split("train")[0][:64]), digits.split("train")[1][:64]).backward()
    optimizer.step()
    before = [p.detach().clone() for p in net.parameters()]
    penalty.FisherWeighted(5.0, biases=False, quantize=penalty.round_to(2)).shrink(optimizer, net, 5.0, 64)
    for p, w in zip(net.parameters(), before, strict=True):
        q, v = penalty.round_to(2)(w), optimizer.state[p]["exp_avg_sq"]
        expected = q + (w - q) / (1 + 2 * 1e-2 * 5.0 * 64 * v / (1 - 0.999)) if p.ndim > 1 else w
        torch.testing.assert_close(p.detach(), expected)


@pytest.mark.parametrize("make", [lambda: penalty.FisherWeighted(1.0), lambda: penalty.FisherQuantization(1.0)])
def test_a_decoupled_step_has_the_learning_rate_of_the_step_before_it(digits, monkeypatch, make):
    taken, used = [], []

    class Keep(torch.optim.Adam):
        def step(self, closure=None):
            taken.append(self.param_groups[0]["lr"])
            return super().step(closure)

    name = "shrink" if isinstance(make(), penalty.FisherWeighted) else "pull"
    whole = getattr(penalty, type(make()).__name__)
    plain = getattr(whole, name)
    monkeypatch.setattr(whole, name, lambda *given: (used.append(given[-1][0]), plain(*given))[1])
    fit(small(digits), digits, epochs=1, optimizer=lambda net: Keep(net.parameters(), 1e-2), lr=1e-2, penalty=make())
    assert taken == used
    assert len(set(taken)) == len(taken) > 2


def test_a_share_of_a_small_batch_leaves_batch_statistics(digits):
    net, (images, labels) = networks()["batch statistics"].double().train(), batch(4)
    assert penalty.FisherTrace(1.0)(net, images, labels, net(images)).isfinite()

def test_a_pull_is_weighted_by_the_moving_average_over_its_largest_value():
    net, rounding = networks()["mlp"].double(), penalty.round_to(2)
    pull = penalty.FisherQuantization(0.5, rounding, constant=0.1, decay=0.9)
    before = {name: w.detach().clone() for name, w in net.named_parameters() if w.ndim > 1}
    means = {name: torch.zeros_like(w) for name, w in before.items()}
    for strength in (0.0, 0.5):  # at a step that `every` leaves out the average goes on
        for name, w in net.named_parameters():
            w.grad = torch.randn_like(w)
            if name in means:
                means[name] = 0.9 * means[name] + 0.1 * w.grad.square()
        pull.pull(torch.optim.SGD(net.parameters(), 0.3), net, strength)
    for name, w in before.items():
        factor = 0.3 * 0.5 * (means[name] / means[name].max() + 0.1)
        torch.testing.assert_close(net.get_parameter(name).detach(), w - factor * (w - rounding(w)))


@pytest.mark.parametrize("make", [penalty.FisherWeighted, penalty.FisherQuantization])
def test_decoupled_steps_have_the_strength_of_the_schedule(digits, monkeypatch, make):
    strengths = []
    name = "shrink" if make is penalty.FisherWeighted else "pull"
    monkeypatch.setattr(make, name, lambda self, optimizer, net, strength, *rest: strengths.append(strength))
    fit(small(digits), digits, epochs=4, penalty=make(0.5, every=2, warmup=0.5))
    left_out = [] if name == "shrink" else [0.0]
    expected = [0.5 * 2 * min(1, step / 6) if step % 2 == 0 else 0.0 for step in range(12)]
    assert [s for s in strengths if s] == pytest.approx([s for s in expected if s])
    assert set(left_out) <= set(strengths)


def test_the_diagonal_is_estimated_anew_every_so_many_steps_and_shrinks_by_its_own_formula(digits, monkeypatch):
    net, steps = small(digits), []
    term = penalty.FisherWeighted(0.5, "diagonal", refresh=4)
    fisher = {name: torch.rand_like(p) for name, p in net.named_parameters()}
    monkeypatch.setattr(penalty, "_diagonal", lambda *_: (steps.append(term.step), fisher)[1])
    fit(net, digits, epochs=4, penalty=term)
    assert steps == [0, 4, 8]
    before = [p.detach().clone() for p in net.parameters()]
    F.cross_entropy(net(digits.split("train")[0][:8]), digits.split("train")[1][:8]).backward()
    term.shrink(torch.optim.SGD(net.parameters(), 0.1), net, 0.5, 8)
    for (name, p), w in zip(net.named_parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), w / (1 + 2 * 0.1 * 0.5 * fisher[name]))


def test_quantisation_pulls_weights_to_their_levels(digits):
    def distance(net):
        return sum((p - penalty.round_to(2)(p)).square().sum() for p in net.parameters() if p.ndim > 1).item()

    pull = penalty.FisherQuantization(30.0, penalty.round_to(2), constant=1.0)
    pulled, _ = fit(small(digits), digits, epochs=8, penalty=pull)
    plain, _ = fit(small(digits), digits, epochs=8)
    assert distance(pulled) < 0.5 * distance(plain)


@pytest.mark.parametrize("name", codec.QUANTIZERS)
def test_a_quantiser_of_the_codec_gives_the_levels_to_pull_to(digits, name):
    net, pull = small(digits), penalty.FisherQuantization(2.0, partial(codec.QUANTIZERS[name], bits=3), constant=1.0)
    levels = {key: codec.QUANTIZERS[name](w.detach(), 3) for key, w in net.named_parameters() if w.ndim > 1}
    for w in net.parameters():
        w.grad = torch.zeros_like(w)
    pull.pull(torch.optim.SGD(net.parameters(), 0.5), net, pull.strength)  # lr strength (0 + c) = 1: the whole way
    for key, goal in levels.items():
        torch.testing.assert_close(net.get_parameter(key).detach(), goal)
    assert f"quantize={name}(bits=3)" in repr(pull)


@pytest.mark.parametrize("make", [lambda: penalty.FisherTrace(1e-2, every=2, warmup=0.5), penalty.FisherQuantization])
def test_a_resumed_run_ends_as_an_uninterrupted_one(digits, tmp_path, make):
    class Stop(Exception):
        pass

    class StopAfter(penalty.L.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 2:
                raise Stop

    whole, _ = fit(small(digits), digits, epochs=4, penalty=make())
    with pytest.raises(Stop):
        fit(small(digits), digits, epochs=4, penalty=make(), checkpoint=tmp_path / "run", callbacks=[StopAfter()])
    resumed, _ = fit(small(digits), digits, epochs=4, penalty=make(), checkpoint=tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("name", [name for name in penalty.NAMES if name != "none"])
def test_the_same_object_can_go_on_from_its_checkpoint(digits, tmp_path, name):
    chosen = of_name(name, 1e-2, teacher=small(digits))
    before = repr(chosen)
    first, _ = fit(small(digits), digits, epochs=1, penalty=chosen, checkpoint=tmp_path / "run")
    again, _ = fit(small(digits), digits, epochs=1, penalty=chosen, checkpoint=tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert repr(chosen) == before


def test_a_penalty_used_again_starts_anew(digits):
    chosen = penalty.FisherQuantization(1.0)
    first, _ = fit(small(digits), digits, epochs=1, penalty=chosen)
    second, _ = fit(small(digits), digits, epochs=1, penalty=chosen)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_checkpoint_of_another_penalty_is_refused(digits, tmp_path):
    fit(small(digits), digits, epochs=1, penalty=penalty.FisherTrace(1e-3), checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match="other settings"):
        fit(small(digits), digits, epochs=1, penalty=penalty.FisherTrace(1e-2), checkpoint=tmp_path / "run")


def test_a_checkpoint_tells_teachers_and_functions_of_one_name_apart(digits, tmp_path):
    def scaled(factor):
        return lambda w: factor * penalty.range_noise(w)

    teacher, other = small(digits), nets.mlp(digits.shape, digits.num_classes, (16,))
    pairs = [(penalty.Distillation(1.0, teacher), penalty.Distillation(1.0, other)),
             (penalty.FisherTrace(1e-3, scaled(1)), penalty.FisherTrace(1e-3, scaled(2))),
             (penalty.FisherQuantization(1.0, lambda w: w.sign()), penalty.FisherQuantization(1.0, lambda w: w.round()))]
    for index, (first, second) in enumerate(pairs):
        assert repr(first) == repr(second)
        options = {"epochs": 1, "checkpoint": tmp_path / f"run {index}"}
        fit(small(digits), digits, penalty=first, **options)
        with pytest.raises(ValueError, match="other settings"):
            fit(small(digits), digits, penalty=second, **options)
    fit(small(digits), digits, epochs=1, checkpoint=tmp_path / "run 1", penalty=penalty.FisherTrace(1e-3, scaled(1)))


def test_a_penalty_that_is_not_finite_stops_with_step_term_and_value(digits):
    class Blow(penalty.L2):
        def term(self, *inputs):
            return super().term(*inputs) / (0 if self.step == 2 else 1)

    with pytest.raises(FloatingPointError, match=r"step 2: Blow\(strength=0.01.* became inf"):
        fit(small(digits), digits, epochs=1, penalty=Blow(0.01))


def test_outputs_from_which_no_label_can_be_drawn_stop_the_run(digits):
    with pytest.raises(FloatingPointError, match=r"step \d+: FisherTrace.* became nan: lower its"):
        fit(small(digits), digits, epochs=1, optimizer="sgd", lr=1e30, schedule="constant", penalty=penalty.FisherTrace(1e-3))


def test_weights_that_a_step_of_the_penalty_blows_up_stop_the_run(digits):
    with pytest.raises(FloatingPointError, match=r"step \d+: the sum of the weights under FisherQuant.* became (nan|-?inf)"):
        fit(small(digits), digits, epochs=10, optimizer="sgd", penalty=penalty.FisherQuantization(1e10))


def test_the_diagonal_of_the_library_can_weight_the_decay(digits):
    pytest.importorskip("fishlib.fisher")
    torch.manual_seed(0)
    net = nets.small_cnn(10, digits.shape, width=4)
    trained, _ = fit(net, digits, epochs=2, optimizer="sgd", lr=0.01, penalty=penalty.FisherWeighted(1.0, "diagonal", 2))
    plain, _ = fit(net, digits, epochs=2, optimizer="sgd", lr=0.01)
    assert sum(p.square().sum() for p in trained.parameters()) < sum(p.square().sum() for p in plain.parameters())
