"""Divergences against formulas written out, against autograd, and against each other."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal

from fishlib import divergence as dv


def gaussians(count, features, seed=0):
    g = torch.Generator().manual_seed(seed)
    mean = torch.randn(count, features, generator=g, dtype=torch.float64)
    return mean, torch.rand(count, features, generator=g, dtype=torch.float64) + 0.2


def covariance(features, seed):
    a = torch.randn(features, 2 * features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T / features


def score_of(density):
    def score(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(density.log_prob(x).sum(), x)[0]
    return score


def test_known_values_of_both_formulas():
    five, one, two = (torch.tensor([float(v)]) for v in (5, 1, 2))
    assert float(dv.fisher_divergence(five, one, five, two)) == 0.125
    assert float(dv.published_divergence(five, one, five, two)) == 6.5


def test_published_formula_depends_on_where_both_densities_lie():
    one, two = torch.ones(1), torch.full((1,), 2.0)
    moved = [float(dv.published_divergence(torch.full((1,), m), one, torch.full((1,), m), two)) for m in (0.0, 100.0)]
    assert moved == [0.25, 2500.25]
    right = [float(dv.fisher_divergence(torch.full((1,), m), one, torch.full((1,), m), two)) for m in (0.0, 100.0)]
    assert right == [0.125, 0.125]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(0, 100), st.floats(0.2, 5))
def test_scale_divides_the_divergence_by_its_square(features, seed, scale):
    mean, var = gaussians(2, features, seed)
    one = dv.fisher_divergence(mean[0], var[0], mean[1], var[1])
    scaled = dv.fisher_divergence(scale * mean[0], scale**2 * var[0], scale * mean[1], scale**2 * var[1])
    assert torch.isclose(scaled, one / scale**2)


def test_all_pairs_at_once_are_the_pairs_one_by_one():
    mean, var = gaussians(7, 50)
    mean = mean + 100
    pairs = dv.fisher_divergence_pairs(mean, var)
    for i in range(7):
        for j in range(7):
            assert torch.isclose(pairs[i, j], dv.fisher_divergence(mean[i], var[i], mean[j], var[j]), atol=1e-9)


def test_full_covariance_agrees_with_the_diagonal_formula_and_with_sampling():
    mean, var = gaussians(2, 3)
    assert torch.isclose(dv.fisher_divergence_gaussian(mean[0], var[0].diag(), mean[1], var[1].diag()),
                         dv.fisher_divergence(mean[0], var[0], mean[1], var[1]))
    p, q = (MultivariateNormal(m, covariance(3, seed)) for seed, m in enumerate(mean))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = p.sample((200_000,))
    sampled = dv.fisher_divergence_sampled(x, *(lambda rows, d=d: score_of_enabled(d, rows) for d in (p, q)))
    exact = dv.fisher_divergence_gaussian(p.loc, p.covariance_matrix, q.loc, q.covariance_matrix)
    assert torch.isclose(sampled, exact, rtol=0.03)


def score_of_enabled(density, rows):
    with torch.enable_grad():
        return score_of(density)(rows)


def test_hyvarinen_score_is_that_of_a_gaussian_written_out():
    cov = covariance(3, 1)
    precision = torch.linalg.inv(cov)
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = dv.hyvarinen_score(x, lambda rows: -rows @ precision)
    assert torch.allclose(found, 0.5 * (x @ precision).square().sum(1) - precision.trace())


def test_hyvarinen_identity_holds_with_p_in_its_last_term_and_fails_with_q():
    g = torch.Generator().manual_seed(0)
    x = 1 + torch.randn(400_000, 1, generator=g, dtype=torch.float64) * math.sqrt(2)

    def p(rows):
        return -(rows - 1) / 2

    def q(rows):
        return -rows / 0.5

    left = dv.hyvarinen_score(x, q).mean()
    between = dv.fisher_divergence(*(torch.tensor([v], dtype=torch.float64) for v in (1, 2, 0, 0.5)))
    assert torch.isclose(left, between - 0.5 * p(x).square().mean(), rtol=0.02)
    assert abs(left - (between - 0.5 * q(x).square().mean())) > 1


def test_score_matching_finds_the_score_of_a_gaussian_and_leaves_the_random_state():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 2, generator=g) * torch.tensor([1.0, 0.7])
    state = torch.random.get_rng_state()
    score = dv.fit_score(x, steps=600)
    assert torch.equal(state, torch.random.get_rng_state())
    error = (score(x) + x / torch.tensor([1.0, 0.49])).square().sum(1).mean()
    assert error < 0.1 * (x / torch.tensor([1.0, 0.49])).square().sum(1).mean()

def test_score_matching_repeats_with_its_seed_and_its_learning_rate_falls_as_a_cosine(monkeypatch):
    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self))[1])
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    first, again, other = (dv.fit_score(x, steps=8, lr=0.1, batch=10, seed=seed)(x) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert rates[:8] == pytest.approx([0.05 * (1 + math.cos(math.pi * t / 8)) for t in range(8)])


def test_score_matching_finds_the_score_of_a_density_that_is_not_gaussian():
    g = torch.Generator().manual_seed(0)
    side = torch.where(torch.rand(4000, 1, generator=g) < 0.5, -1.5, 1.5)
    x = side + 0.6 * torch.randn(4000, 1, generator=g)

    def exact(rows):  # of the mixture of two Gaussians
        right = torch.sigmoid(rows * 2 * 1.5 / 0.36)
        return (-(rows + 1.5) * (1 - right) - (rows - 1.5) * right) / 0.36

    score = dv.fit_score(x, steps=800)
    size = exact(x).square().mean()
    gaussian = -(x - x.mean()) / x.var()
    assert (score(x) - exact(x)).square().mean() < 0.1 * size
    assert (gaussian - exact(x)).square().mean() > 0.5 * size
    # The Fisher divergence from the mixture to a Gaussian, by learned scores and by exact ones.
    found = dv.fisher_divergence_sampled(x, score, lambda rows: -rows)
    assert torch.isclose(found, dv.fisher_divergence_sampled(x, exact, lambda rows: -rows), rtol=0.15)


def test_energy_distance_is_the_mean_over_pairs():
    x, y = (torch.randn(n, 3, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (5, 7))

    def mean(a, b):
        return np.mean([float((s - t).norm()) for s in a for t in b])

    assert float(dv.energy_distance(x, y)) == pytest.approx(2 * mean(x, y) - mean(x, x) - mean(y, y))


def test_distance_correlation_is_that_of_the_definition():
    g = torch.Generator().manual_seed(0)
    x, labels = torch.randn(9, 2, generator=g, dtype=torch.float64), torch.arange(9) % 3
    a = np.array([[float((s - t).norm()) for s in x] for t in x])
    b = np.array([[float(s != t) for s in labels] for t in labels])
    a, b = (m - m.mean(0) - m.mean(1)[:, None] + m.mean() for m in (a, b))
    expected = math.sqrt((a * b).mean() / math.sqrt((a * a).mean() * (b * b).mean()))
    assert float(dv.distance_correlation(x, labels)) == pytest.approx(expected)


def test_dependence_is_large_for_separated_classes_and_small_for_mixed_ones():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    noise = torch.randn(300, 2, generator=g, dtype=torch.float64)
    apart = noise + 20 * labels[:, None]
    onehot = torch.nn.functional.one_hot(labels).double()
    assert float(dv.kde_mutual_information(apart, labels)) == pytest.approx(math.log(3), abs=0.02)
    assert abs(float(dv.kde_mutual_information(noise, labels))) < 0.1
    assert dv.distance_correlation(apart, labels) > 0.8 > 0.3 > dv.distance_correlation(noise, labels)
    assert float(dv.linear_cka(onehot, onehot)) == pytest.approx(1)
    assert dv.linear_cka(noise, onehot) < 0.1


def test_measures_of_dependence_do_not_change_far_from_the_origin():
    g = torch.Generator().manual_seed(0)
    near, labels = torch.randn(80, 3, generator=g), torch.arange(80) % 2
    near[labels == 1] += 0.5
    rows = 100 + 0.01 * near  # float32
    exact = rows.double() - 100
    for found, expected in ((dv.distance_correlation(rows, labels), dv.distance_correlation(exact, labels)),
                            (dv.kde_mutual_information(rows, labels), dv.kde_mutual_information(exact, labels)),
                            (dv.energy_distance(rows[:40], rows[40:]), dv.energy_distance(exact[:40], exact[40:]))):
        assert found.dtype == torch.float32
        assert float(found) == pytest.approx(float(expected), rel=1e-3)
    assert dv.distance_correlation(rows, labels) > 0.1

def test_kernel_information_is_that_of_sums_over_the_other_rows():
    g = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 4 + [2] * 9 + [1] * 7)
    x = torch.randn(20, 3, generator=g, dtype=torch.float64) + labels[:, None]
    spread = x.var(0, correction=0).mean().sqrt()
    for bandwidth, width in ((0.7, 0.7), (None, float(spread) * 20 ** (-1 / 7))):
        total = 0.0
        for i in range(20):
            density = {c: 0.0 for c in (0, 1, 2)}
            for j in range(20):
                if i != j:
                    density[int(labels[j])] += math.exp(-float((x[i] - x[j]).square().sum()) / (2 * width**2))
            density = {c: s / (int((labels == c).sum()) - (c == int(labels[i]))) for c, s in density.items()}
            whole = sum(density[c] * int((labels == c).sum()) / 20 for c in density)
            total += math.log(density[int(labels[i])] / whole) / 20
        assert float(dv.kde_mutual_information(x, labels, bandwidth)) == pytest.approx(total, rel=1e-9)


def test_bias_of_independent_features_is_as_stated():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, 5000, generator=g, dtype=torch.float64) for _ in range(2))
    labels = torch.arange(50) % 5
    assert float(dv.distance_correlation(x, labels)) == pytest.approx((4 / 49) ** 0.25, rel=0.02)
    assert float(dv.linear_cka(x, torch.nn.functional.one_hot(labels).double())) == pytest.approx((4 / 49) ** 0.5, rel=0.05)
    assert dv.linear_cka(x, y) > 0.98
    pairs = torch.cdist(x, x).sum() / (50 * 49)
    assert float(dv.energy_distance(x, y)) == pytest.approx(float((1 / 50 + 1 / 50) * pairs), rel=0.1)
    assert dv.kde_mutual_information(x, labels) < -1


def test_constant_features_depend_on_nothing():
    x, labels = torch.ones(6, 2), torch.arange(6) % 2
    assert dv.distance_correlation(x, labels) == 0
    assert dv.linear_cka(x, torch.nn.functional.one_hot(labels).float()) == 0
    assert dv.kde_mutual_information(x, labels) == 0


def test_shrunk_covariance_is_positive_definite_with_fewer_rows_than_features():
    x = torch.randn(3, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.linalg.cholesky(dv.shrunk_covariance(x))


ONE, ZERO, EYE, NAN = torch.ones(2), torch.zeros(2), torch.eye(2), torch.full((3, 2), torch.nan)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: dv.fisher_divergence(ONE, ZERO, ONE, ONE), "not positive"),
    (lambda: dv.fisher_divergence_pairs(torch.ones(3, 2), NAN), "not positive"),
    (lambda: dv.fisher_divergence_gaussian(ZERO, -EYE, ZERO, EYE), "not positive definite"),
    (lambda: dv.kl_gaussian_full(ZERO, EYE, ZERO, torch.full((2, 2), torch.nan)), "not positive definite"),
    (lambda: dv.js_gaussian_full(ZERO, EYE, ZERO, torch.ones(2, 2)), "not positive definite"),
    (lambda: dv.kl_histogram_pairs(NAN), "finite"),
    (lambda: dv.js_histogram_pairs(-torch.ones(2, 3)), "none negative"),
    (lambda: dv.energy_distance(NAN, torch.ones(3, 2)), "not finite"),
    (lambda: dv.linear_cka(torch.ones(1, 2), torch.ones(1, 2)), "two rows or more"),
    (lambda: dv.kde_mutual_information(torch.eye(3, 2), torch.tensor([0, 0, 1])), "single row"),
    (lambda: dv.kde_mutual_information(torch.eye(4, 2), torch.tensor([0, 0, 1, 1]), bandwidth=-1), "bandwidth=-1"),
])
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Kullback-Leibler and Jensen-Shannon.


def test_kl_of_gaussians_is_that_of_torch():
    mean, var = gaussians(2, 4)
    p, q = (MultivariateNormal(mean[i], torch.diag(var[i])) for i in range(2))
    expected = torch.distributions.kl_divergence(p, q)
    assert torch.isclose(dv.kl_gaussian(mean[0], var[0], mean[1], var[1]), expected)
    p, q = (MultivariateNormal(mean[i], covariance(4, i)) for i in range(2))
    found = dv.kl_gaussian_full(mean[0], covariance(4, 0), mean[1], covariance(4, 1))
    assert torch.isclose(found, torch.distributions.kl_divergence(p, q))
    with pytest.raises(ValueError, match="variance"):
        dv.kl_gaussian(mean[0], var[0], mean[1], 0 * var[1])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(0, 100), st.floats(0.2, 5))
def test_kl_is_free_of_scale_and_never_negative(features, seed, scale):
    mean, var = gaussians(2, features, seed)
    one = dv.kl_gaussian(mean[0], var[0], mean[1], var[1])
    assert one >= 0
    assert torch.isclose(dv.kl_gaussian(scale * mean[0], scale**2 * var[0], scale * mean[1], scale**2 * var[1]), one)


def test_js_of_gaussians_is_the_integral_over_a_grid():
    x = torch.linspace(-15, 15, 200_001, dtype=torch.float64)
    zero, two = torch.zeros(1, dtype=torch.float64), torch.full((1,), 2.0, dtype=torch.float64)
    p, q = (torch.distributions.Normal(m, s).log_prob(x).exp() for m, s in ((0.0, 1.0), (2.0, 1.5)))
    mixed = (p + q) / 2
    parts = [torch.special.entr(one).sum() * (x[1] - x[0]) for one in (mixed, p, q)]
    expected = float(parts[0] - (parts[1] + parts[2]) / 2)
    found = dv.js_gaussian_full(zero, torch.eye(1).double(), two, 2.25 * torch.eye(1).double(), samples=40_000)
    assert float(found) == pytest.approx(expected, abs=3 * math.log(2) / 200)
    far = dv.js_gaussian_full(zero, torch.eye(1).double(), 100 * two, torch.eye(1).double())
    assert float(far) == pytest.approx(math.log(2))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(2, 20), st.integers(0, 100))
def test_divergences_of_histograms_are_those_of_loops(rows, bins, seed):
    counts = torch.randint(0, 9, (rows, bins), generator=torch.Generator().manual_seed(seed))
    kl, js = dv.kl_histogram_pairs(counts), dv.js_histogram_pairs(counts)
    p = (counts + 0.5) / (counts + 0.5).sum(1, keepdim=True)
    for i in range(rows):
        for j in range(rows):
            m = (p[i] + p[j]) / 2
            assert float(kl[i, j]) == pytest.approx(float((p[i] * (p[i] / p[j]).log()).sum()), abs=1e-6)
            expected = ((p[i] * (p[i] / m).log()).sum() + (p[j] * (p[j] / m).log()).sum()) / 2
            assert float(js[i, j]) == pytest.approx(float(expected), abs=1e-6)
    torch.testing.assert_close(dv.kl_histogram_pairs(counts, counts), kl, atol=1e-12, rtol=0)
    torch.testing.assert_close(dv.js_histogram_pairs(counts, counts), js)


def test_estimates_of_kl_from_samples_come_near_the_closed_form():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(4000, 1, generator=g, dtype=torch.float64), torch.randn(4000, 1, generator=g, dtype=torch.float64)
    y = 1 + 1.5 * y
    one = torch.ones(1, dtype=torch.float64)
    expected = float(dv.kl_gaussian(0 * one, one, one, 2.25 * one))
    assert float(dv.kl_nearest_neighbours(x, y)) == pytest.approx(expected, abs=0.08)
    counts = torch.stack([torch.histc(rows, 40, -6, 6) for rows in (x, y)])
    assert float(dv.kl_histogram_pairs(counts)[0, 1]) == pytest.approx(expected, abs=0.05)


def test_neighbours_are_those_of_sorted_distances():
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(30, 3, generator=g, dtype=torch.float64), torch.randn(40, 3, generator=g, dtype=torch.float64)
    total = 0.0
    for i in range(30):
        within = sorted(float((x[i] - x[j]).norm()) for j in range(30) if j != i)[1]
        across = sorted(float((x[i] - row).norm()) for row in y)[1]
        total += 3 * math.log(across / within) / 30
    assert float(dv.kl_nearest_neighbours(x, y, k=2)) == pytest.approx(total + math.log(40 / 29))


def test_neighbours_refuse_rows_that_repeat_and_too_few_rows():
    x = torch.zeros(20, 1)
    with pytest.raises(ValueError, match="repeat"):
        dv.kl_nearest_neighbours(x, x + 1)
    with pytest.raises(ValueError, match="more than k rows"):
        dv.kl_nearest_neighbours(torch.randn(5, 1), torch.randn(9, 1))
    with pytest.raises(ValueError, match="positive smoothing"):
        dv.kl_histogram_pairs(torch.ones(2, 3), smoothing=0)
