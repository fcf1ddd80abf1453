"""Lesions, scores, clusters and the pruning of units."""

import copy
import functools
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning.callbacks import Timer

from fishlib import divergence, nets, penalty, training, units
from fishlib.data import ImageData

QUICK = {"epochs": 1, "optimizer": "sgd", "lr": 0.05}


@pytest.fixture(scope="module")
def data():
    return ImageData("digits", device="cpu", limit=400, validation=0.25)


@pytest.fixture(scope="module")
def net(data):
    torch.manual_seed(0)
    return training.fit(nets.resnet(14, channels=1, width=4), data, epochs=3, optimizer="sgd", lr=0.1)[0]


@pytest.fixture(scope="module")
def dense(data):
    torch.manual_seed(0)
    return training.fit(nets.densenet(16, 4, channels=1), data, epochs=1, optimizer="sgd", lr=0.1)[0]


class Labelled:
    """A few images of the digits with other labels, as a data module gives them."""

    def __init__(self, data, labels):
        self.batch = data.batches("train", shuffle=False)
        self.batch.images, self.batch.labels = self.batch.images[:len(labels)], torch.tensor(labels)

    def batches(self, split, batch_size=512, shuffle=None):
        return self.batch


# Lesions


@pytest.mark.parametrize("order", units.ORDERS)
@pytest.mark.parametrize("build", [lambda: nets.resnet(14, channels=1, width=4), lambda: nets.plain(14, channels=1, width=4),
                                   lambda: nets.densenet(16, 4, channels=1), lambda: nets.vgg(11, channels=1, width=4)])
def test_lesion_is_evaluation_with_the_units_switched_off(build, order, data):
    torch.manual_seed(0)
    net = build()
    table = units.lesion(net, data, order, repeats=2, batch_size=64)
    for row in table.itertuples():
        with units.removed(net, row.units):
            assert training.evaluate(net, data).accuracy == pytest.approx(row.accuracy, abs=0.011)
    assert len(table) == 1 + len(net.units) * {"single": 1, "forward": 1, "random": 2}[order]
    assert table.loss_points[0] == 0

def test_lesions_are_of_the_split_and_in_the_orders_of_the_seed(net, data):
    for split in ("train", "validation"):
        expected = training.evaluate(net, data, split).accuracy
        assert units.lesion(net, data, split=split).accuracy[0] == pytest.approx(expected)
    first, again, other = (units.lesion(net, data, "random", repeats=1, seed=seed).units.tolist() for seed in (0, 0, 1))
    assert first == again != other


def test_lesions_share_the_pass_up_to_the_first_removed_unit(net, data):
    calls = []
    hooks = [unit.register_forward_hook(lambda *_, place=place: calls.append(place))
             for place, unit in enumerate(net.units)]
    units.lesion(net, data, "single", batch_size=10_000)
    for hook in hooks:
        hook.remove()
    n = len(net.units)
    # The unit at place p runs once for the intact network and once for each lesion before it.
    assert [calls.count(place) for place in range(n)] == [1 + place for place in range(n)]


def test_lesion_leaves_alpha_and_modes_as_they_were(net, data):
    net.train()
    with units.removed(net, [1]):
        units.lesion(net, data, "random", repeats=1)
        assert not net.units[1].active
    assert all(unit.active for unit in net.units)
    assert net.training
    net.eval()


def test_removed_units_come_back_after_an_exception(net):
    with pytest.raises(RuntimeError), units.removed(net, [0, 2]):  # noqa: PT012
        assert [unit.active for unit in net.units][:3] == [False, True, False]
        raise RuntimeError
    assert all(unit.active for unit in net.units)


# Scores


def direct_score(net, data, images, formula=divergence.fisher_divergence, pairs="all", standardise="feature",
                 floor=1e-2, pooled=False):
    """All features in memory, class by class and pair by pair, float64."""
    x, labels = data.batches("train", 10_000, shuffle=False), None
    x, labels = next(iter(x))
    chosen = np.round(np.linspace(0, len(labels) - 1, images)).astype(int)
    x, labels = x[chosen], labels[chosen]
    found = []
    for unit in net.units:
        kept = []
        hook = unit.writer.register_forward_hook(lambda m, i, output, kept=kept: kept.append(output))
        with torch.no_grad():
            net.eval()(x)
        hook.remove()
        t = (kept[0].mean((2, 3)) if pooled else kept[0].flatten(1)).double()
        if standardise == "sample":
            t = (t - t.mean(1, keepdim=True)) / t.std(1, correction=0, keepdim=True)
        else:
            # the total variance as the mixture has it: class variances with divisor n - 1, and between classes
            within = sum((labels == c).double().mean() * t[labels == c].var(0) for c in range(10))
            between = sum((labels == c).double().mean() * (t[labels == c].mean(0) - t.mean(0)) ** 2 for c in range(10))
            total = within + between
            t = (t - t.mean(0))[:, total > 1e-12] / total[total > 1e-12].sqrt()
        mean = torch.stack([t[labels == c].mean(0) for c in range(10)])
        var = torch.stack([t[labels == c].var(0) for c in range(10)]).clamp_min(floor)
        reference = int(torch.bincount(labels).argmax())
        found.append(max(float(formula(mean[i], var[i], mean[j], var[j])) for i in range(10) for j in range(10)
                         if i != j and (pairs == "all" or j == reference)))
    return np.array(found)


@pytest.mark.parametrize("batch_size", [17, 64, 1000])
def test_streamed_score_is_the_direct_one_whatever_the_batches(net, data, batch_size):
    found = units.fisher_score(net, data, images=200, batch_size=batch_size)
    assert np.allclose(found, direct_score(net, data, 200), rtol=1e-3)


def test_pooled_and_published_scores_are_the_direct_ones(net, data):
    assert np.allclose(units.fisher_score(net, data, feature="pooled", images=200),
                       direct_score(net, data, 200, pooled=True), rtol=1e-3)
    assert np.allclose(units.fisher_score(net, data, images=200, **units.PUBLISHED),
                       direct_score(net, data, 200, divergence.published_divergence, "reference", "sample"), rtol=1e-3)


def test_published_formula_alone_is_the_direct_one_of_standardised_features(net, data):
    shifted = units.keep(net, range(6))
    torch.nn.init.constant_(shifted.units[5].bn2.bias, 10)  # nothing reads the last maps but the head
    found = units.fisher_score(shifted, data, images=200, formula="published")
    assert np.allclose(found, direct_score(shifted, data, 200, divergence.published_divergence), rtol=1e-3)
    assert found[5] == pytest.approx(units.fisher_score(net, data, images=200, formula="published")[5], rel=1e-3)


def test_moments_are_those_of_all_rows_also_far_from_zero():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=g, dtype=torch.float64) * 1e-3 + 1000
    labels = torch.randint(3, (500,), generator=g)
    moments = units.Moments(3, 6, torch.device("cpu"))
    for rows, of in zip(x.split(37), labels.split(37), strict=True):
        moments.add(rows, of)
    for c in range(3):
        assert torch.allclose(moments.mean[c], x[labels == c].mean(0), rtol=1e-12)
        assert torch.allclose(moments.variance[c], x[labels == c].var(0), rtol=1e-6)


@pytest.mark.parametrize("name", units.SCORES)
def test_every_score_names_the_active_units_and_changes_nothing(name, dense, data):
    weights = {key: value.clone() for key, value in dense.state_dict().items()}
    generator = torch.random.get_rng_state()
    with units.removed(dense, [1]):
        found = units.SCORES[name](dense, data, seed=3)
    assert found.index.tolist() == [0, 2, 3, 4, 5]
    assert np.isfinite(found).all()
    assert found.equals(units.SCORES[name](units.keep(dense, [0, 2, 3, 4, 5]), data, seed=3).set_axis(found.index)) \
        or np.allclose(found, units.SCORES[name](units.keep(dense, [0, 2, 3, 4, 5]), data, seed=3), rtol=1e-2)
    assert all(torch.equal(weights[key], value) for key, value in dense.state_dict().items())
    assert all(parameter.grad is None for parameter in dense.parameters())
    assert torch.equal(generator, torch.random.get_rng_state())

def test_the_reference_of_published_pairs_is_the_most_frequent_class_also_where_a_label_is_missing(net, data):
    labels = [1] * 10 + [4] * 30 + [6] * 10
    maps = []
    with torch.no_grad(), units._watching(net.units, lambda place, output: maps.append(output)):
        net.eval()(data.split("train")[0][:50])
    y = torch.tensor(labels)
    for unit, found in enumerate(units.fisher_score(net, Labelled(data, labels), pairs="reference", images=50)):
        x = maps[unit].flatten(1).double()
        mean, var = (torch.stack([getattr(x[y == c], what)(0) for c in (1, 4, 6)]) for what in ("mean", "var"))
        share = torch.tensor([0.2, 0.6, 0.2], dtype=torch.float64)[:, None]
        total = (share * (var + (mean - x.mean(0)).square())).sum(0)
        varies = total > 1e-12
        mean, var = ((mean - x.mean(0)) / total.sqrt())[:, varies], (var / total)[:, varies].clamp_min(1e-2)
        expected = max(float(divergence.fisher_divergence(mean[p], var[p], mean[1], var[1])) for p in (0, 2))
        assert found == pytest.approx(expected, rel=1e-3)


def test_random_scores_are_those_of_their_seed(net):
    assert units.random_score(net, seed=3).equals(units.random_score(net, seed=3))
    assert not units.random_score(net, seed=3).equals(units.random_score(net, seed=4))


def test_norm_and_cka_scores_are_those_of_their_definitions(dense, net, data):
    unit = dense.units[1]
    weights = np.concatenate([unit.conv1.weight.detach().numpy().ravel(), unit.conv2.weight.detach().numpy().ravel()])
    assert units.norm_score(dense)[1] == pytest.approx(np.sqrt(np.mean(weights.astype(float) ** 2)))
    images, labels = data.split("train")
    kept = []
    hook = net.units[3].writer.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with torch.no_grad():
        net.eval()(images)
    hook.remove()
    x = kept[0].mean((2, 3)).double().numpy()
    x = (x - x.mean(0)) / x.std(0)
    same = (labels[:, None] == labels[None, :]).double().numpy()
    centre = np.eye(len(x)) - 1 / len(x)
    k, m = centre @ x @ x.T @ centre, centre @ same @ centre  # Gram matrices over the images
    expected = (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())
    assert units.cka_score(net, data, images=10_000)[3] == pytest.approx(expected, rel=1e-4)


def test_full_density_and_score_matching_give_finite_scores_of_pooled_features(net, data):
    small, two = units.keep(net, [3]), Labelled(data, [0, 1] * 60)
    for density in ("full", "score-matching"):
        found = units.fisher_score(small, two, density=density, feature="pooled", images=120)
        assert np.isfinite(found).all()
        assert (found > 0).all()


def test_taylor_score_is_the_squared_slope_of_the_loss_along_alpha(net, data):
    images, labels = data.split("train")
    place, unit, step = 2, net.units[2], 1e-3
    slopes = []
    for image, label in zip(images[:20], labels[:20], strict=True):
        losses = []
        for alpha in (1 + step, 1 - step):
            hook = unit.writer.register_forward_hook(lambda m, i, output, alpha=alpha: alpha * output)
            with torch.no_grad():
                losses.append(torch.nn.functional.cross_entropy(net.double()(image[None].double()), label[None]))
            hook.remove()
        slopes.append(float(losses[0] - losses[1]) / (2 * step))
    net.float()
    batch = Labelled(data, labels[:20].tolist())
    batch.size = lambda split: 20
    assert units.taylor_score(net, batch)[place] == pytest.approx(np.mean(np.square(slopes)), rel=1e-2)


@pytest.mark.parametrize("density", units.DENSITIES)
def test_score_of_a_constant_unit_is_zero(density, net, data):
    other = units.keep(net, [3, 4])
    torch.nn.init.zeros_(other.units[1].bn2.weight)
    found = units.fisher_score(other, Labelled(data, [0, 1] * 30), density=density, feature="pooled", images=60)
    assert found[1] == 0
    assert found[0] > 0


@pytest.mark.parametrize("level", [100.1, 1000.3])
def test_rounding_of_a_constant_far_from_zero_counts_nothing(level, net, data):
    other = units.keep(net, [3, 4])
    torch.nn.init.zeros_(other.units[1].bn2.weight)
    torch.nn.init.constant_(other.units[1].bn2.bias, level)
    assert units.fisher_score(other, data, images=300)[1] == 0
    assert units.fisher_score(other, data, feature="pooled", images=300)[1] == 0


def test_score_matching_of_a_class_in_which_nothing_varies_takes_the_floor(monkeypatch):
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.zeros(200, 1), 1 + torch.randn(200, 1, generator=g)])
    monkeypatch.setattr(units, "collect", lambda *_: ([x], torch.arange(400) // 200))
    for floor in (0.25, 1.0):
        mean, var = torch.tensor([0.0, 1.0])[:, None], torch.tensor([floor, 1.0])[:, None]
        expected = float(divergence.fisher_divergence_pairs(mean, var).max())
        (found,) = units._density_scores(None, None, "score-matching", "all", "pooled", "feature", 400, floor, 0)
        assert expected / 2 < found < 2 * expected  # a learned score is no more exact


def test_noise_raises_only_the_variances_below_the_floor():
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.tensor([0.0, 0.1, 1.0])
    raised = units._raised(x, 0.04, 1)
    assert raised.var(0)[:2] == pytest.approx([0.04, 0.04], rel=0.05)
    assert torch.equal(raised[:, 2], x[:, 2])


def test_full_density_of_a_class_in_which_nothing_varies_takes_the_floor(monkeypatch):
    x = torch.cat([torch.zeros(20, 2), torch.tensor([[1.0, 2.0], [3.0, 1.0], [2.0, 2.0]] * 10)])
    labels = torch.tensor([0] * 20 + [1] * 30)
    monkeypatch.setattr(units, "collect", lambda *_: ([x], labels))
    cov = divergence.shrunk_covariance(x[20:].double())
    means = torch.zeros(2, dtype=torch.float64), x[20:].double().mean(0)
    expected = max(divergence.fisher_divergence_gaussian(means[0], 0.01 * torch.eye(2, dtype=torch.float64), means[1], cov),
                   divergence.fisher_divergence_gaussian(means[1], cov, means[0], 0.01 * torch.eye(2, dtype=torch.float64)))
    (found,) = units._density_scores(None, None, "full", "all", "pooled", "feature", 50, 0.01, 0)
    assert found == pytest.approx(float(expected))


@pytest.mark.parametrize("score", [units.fisher_score, units.energy_score])
def test_bad_data_is_named(score, net, data):
    with pytest.raises(ValueError, match="one class only"):
        score(net, Labelled(data, [3] * 20))
    with pytest.raises(ValueError, match="class 7 has a single image"):
        score(net, Labelled(data, [1, 2] * 10 + [7]))
    broken = units.keep(net, range(6))
    torch.nn.init.constant_(broken.units[2].bn2.bias, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        score(broken, data)


def test_network_without_units_is_named(data):
    for call in (units.fisher_score, units.lesion, units.prune_units):
        with pytest.raises(ValueError, match="no skip-units"):
            call(nets.small_cnn(), data)
    with pytest.raises(ValueError, match="no skip-units"):
        units.keep(nets.lenet300(), [0])


def test_unknown_names_are_answered_with_the_known_ones(net, data):
    for name in ("density", "pairs", "feature", "standardise", "formula"):
        with pytest.raises(ValueError, match=f"unknown {name} 'x': use one of"):
            units.fisher_score(net, data, **{name: "x"})
    with pytest.raises(ValueError, match="unknown order"):
        units.lesion(net, data, "x")
    with pytest.raises(ValueError, match="units 0 to 5"):
        units.keep(net, [6])


def test_features_that_do_not_fit_are_refused_before_memory_runs_out(net, data, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(units, "MEMORY", 1000)
        with pytest.raises(ValueError, match="feature='pooled'"):
            units.fisher_score(net, data, density="full", feature="flat")
    # 60 images of 4 x 8 x 8 numbers are 60 KiB, their ten covariances 5 MiB.
    monkeypatch.setattr(units, "MEMORY", 1 << 20)
    with pytest.raises(ValueError, match="10 covariances of 256 flat features"):
        units.fisher_score(net, Labelled(data, list(range(10)) * 6), density="full", feature="flat", images=60)


@pytest.mark.parametrize(("call", "wrong", "message"), [
    (units.fisher_score, {"images": 0}, "images=0"), (units.fisher_score, {"batch_size": 0}, "batch_size=0"),
    (units.fisher_score, {"images": -5}, "images=-5"), (units.energy_score, {"images": 0}, "images=0"),
    (units.fisher_score, {"floor": -1.0}, "floor=-1.0"), (units.fisher_score, {"floor": float("nan")}, "floor=nan"),
    (units.taylor_score, {"images": 0}, "images=0"), (units.lesion, {"batch_size": 0}, "batch_size=0"),
    (units.lesion, {"order": "random", "repeats": 0}, "repeats=0")])
def test_numbers_that_cannot_be_are_named(call, wrong, message, net, data):
    with pytest.raises(ValueError, match=message):
        call(net, data, **wrong)


@pytest.mark.parametrize("score", [units.taylor_score, units.norm_score])
def test_scores_that_are_not_finite_name_the_unit(score, net, data):
    broken = units.keep(net, range(6))
    torch.nn.init.constant_(broken.units[2].conv1.weight, float("nan"))
    with pytest.raises(ValueError, match=rf"{score.__name__.removesuffix('_score')} score of unit \d is not finite"):
        score(broken, data)


# Clusters


def spread(values, labels):
    values, labels = np.array(values), np.array(labels)
    return sum(((values[labels == one] - values[labels == one].mean()) ** 2).sum() for one in set(labels.tolist()))


def partitions(n, k):
    """All ways to put n things into exactly k clusters."""
    return [labels for labels in itertools.product(range(k), repeat=n) if len(set(labels)) == k]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 4), st.floats(-10, 10, width=32)), min_size=1, max_size=5), st.data())
def test_clusters_are_the_best_of_all_partitions(values, draw):
    k = draw.draw(st.integers(1, len(values)))
    labels = units.cluster(values, k)
    assert set(labels.tolist()) == set(range(k))
    assert spread(values, labels) <= min(spread(values, one) for one in partitions(len(values), k)) + 1e-8


@settings(max_examples=100, deadline=None)
@given(st.lists(st.builds(lambda digits, power: digits * 10.0**power, st.integers(-99, 99), st.integers(-6, 9)), min_size=1,
                max_size=5), st.data())
def test_clusters_of_mixed_magnitudes_are_the_best_of_all_partitions(values, draw):
    k = draw.draw(st.integers(1, len(values)))
    least = min(spread(values, one) for one in partitions(len(values), k))
    assert spread(values, units.cluster(values, k)) <= least * (1 + 1e-9) + 1e-30


@pytest.mark.parametrize(("values", "labels"), [
    ([0.0, 0.1, 0.3, 1e8], [0, 0, 1, 2]), ([5.0, 5.2, 9.0, 1e5, 3e9], [0, 0, 1, 2, 3])])
def test_small_clusters_beside_large_numbers_are_kept_apart(values, labels):
    assert units.cluster(values, max(labels) + 1).tolist() == labels


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30), st.data())
def test_clusters_rise_with_the_scores(values, draw):
    k = draw.draw(st.integers(1, len(values)))
    labels = units.cluster(values, k)
    order = np.argsort(values, kind="stable")
    assert (np.diff(labels[order]) >= 0).all()


def test_equal_scores_are_split_by_order():
    assert units.cluster([2.0] * 4, 2).tolist() == units.cluster([2.0] * 4, 2).tolist()
    assert len(set(units.cluster([2.0] * 4, 3).tolist())) == 3
    assert units.heads([2.0] * 4, units.cluster([2.0] * 4, 1)) == [0]


@pytest.mark.parametrize(("values", "k", "message"), [
    ([1.0, 2.0], 3, "k=3 clusters of 2 units"), ([1.0], 0, "k=0"), ([1.0, float("nan")], 1, "not finite")])
def test_impossible_clusters_are_named(values, k, message):
    with pytest.raises(ValueError, match=message):
        units.cluster(values, k)


def test_heads_are_nearest_to_the_centroid_or_lowest():
    scores, labels = [0.0, 10.0, 1.0, 2.2, 13.0, 11.0], [0, 1, 0, 0, 1, 1]
    assert units.heads(scores, labels) == [2, 5]
    assert units.heads(scores, labels, "lowest") == [0, 1]
    with pytest.raises(ValueError, match="unknown head"):
        units.heads(scores, labels, "x")


@given(st.lists(st.floats(1e-3, 1e6), min_size=2, max_size=2), st.permutations([0, 1]))
def test_of_two_members_the_lowest_place_is_the_head(pair, order):
    assert units.heads([pair[place] for place in order], [0, 0]) == [0]


# Pruning


def test_choice_is_the_smallest_k_within_the_tolerance():
    errors = {3: 0.10, 5: 0.052, 7: 0.05}
    assert units.choose(errors) == 7
    assert units.choose(errors, 0.002) == 5
    assert units.choose(errors, 0.05) == 3


def test_pruning_records_every_stage(net, data):
    pruned = units.prune_units(net, data, stages=2, candidates=[[3, 4], [2]], retrain=QUICK, score="fisher")
    assert len(pruned.net.units) == len(pruned.kept) == 2
    assert pruned.table.stage.tolist() == [-1, 0, 0, 1]
    assert pruned.table.chosen.sum() == 3
    chosen = pruned.table[pruned.table.chosen]
    assert chosen.parameters.is_monotonic_decreasing
    assert chosen.kept.iloc[-1] == pruned.kept
    assert chosen.validation_error_after.notna()[1:].all()
    assert set(pruned.scores.columns) >= {"stage", "unit", "score", "cluster_3", "cluster_4", "cluster_2"}
    assert set(pruned.scores[pruned.scores.stage == 1].unit) == set(chosen.kept.iloc[1])
    final = pruned.table.iloc[-1].validation_error_after
    assert 1 - training.evaluate(pruned.net, data).accuracy == pytest.approx(final)
    assert len(net.units) == 6

def test_errors_decide_by_their_split_and_within_the_tolerance(net, data, monkeypatch):
    errors = {("train", 3): 0.10, ("train", 5): 0.05, ("validation", 3): 0.2, ("validation", 4): 0.3, ("validation", 5): 0.3}

    class Found:
        def __init__(self, error):
            self.accuracy = 1 - error

    monkeypatch.setattr(units, "evaluate", lambda net, data, split: Found(errors.get((split, len(net.units)), 0.06)))
    kept = lambda **options: len(units.prune_units(net, data, stages=1, candidates=[3, 4, 5], score="norm", **options).kept)  # noqa: E731
    assert kept() == kept(decide="validation") == 3
    assert kept(decide="train") == 5
    assert kept(decide="train", tolerance=0.011) == 4
    assert kept(decide="train", tolerance=0.051) == 3


def test_every_stage_scores_and_retrains_by_a_seed_of_its_own(net, data, monkeypatch):
    scored, retrained = [], []
    monkeypatch.setitem(units.SCORES, "random", lambda net, data, seed: (scored.append(seed), units.random_score(net))[1])
    monkeypatch.setattr(units, "fit", functools.wraps(training.fit)(
        lambda net, data, seed, **options: (retrained.append(seed), (net, None))[1]))
    units.prune_units(net, data, stages=2, candidates=[[4], [2]], score="random", retrain={"epochs": 1}, seed=7)
    assert scored == [7, 8]
    assert retrained == [8, 9]


def test_pruning_follows_the_score_and_its_clusters(net, data):
    def score(net, data):
        return pd.Series([0.0, 5.0, 0.1, 5.1, 10.0, 0.2])

    pruned = units.prune_units(net, data, stages=1, candidates=[3], score=score)
    assert pruned.kept == [1, 2, 4]
    pruned = units.prune_units(net, data, stages=1, candidates=[3], score=score, head="lowest")
    assert pruned.kept == [0, 1, 4]


def test_candidates_may_be_an_array_and_a_score_in_any_order(net, data):
    def score(net, data):
        return pd.Series([0.0, 5.0, 0.1, 5.1, 10.0, 0.2])[::-1]

    for candidates in (np.array([3, 6]), [np.int64(3)], [np.array([3, 6])], (np.float32(0.5),), range(3, 4)):
        assert units.prune_units(net, data, stages=1, candidates=candidates, score=score).kept == [1, 2, 4]


def test_shares_are_of_the_active_units_and_a_stage_without_candidates_ends_the_run(net, data):
    pruned = units.prune_units(net, data, stages=9, candidates=(0.5,), score="random")
    assert pruned.table.k.tolist() == [6, 3, 2, 1]


def test_candidates_can_be_compared_after_retraining(net, data):
    pruned = units.prune_units(net, data, stages=1, candidates=[2, 4], retrain=QUICK, compare="after", score="norm")
    assert pruned.table.validation_error_after.notna().sum() == 2


def test_pruning_never_reads_the_test_split(net, data, monkeypatch):
    asked = []
    original = ImageData._of
    monkeypatch.setattr(ImageData, "_of", lambda self, split: asked.append(split) or original(self, split))
    units.prune_units(net, data, stages=1, candidates=[3], retrain=QUICK, score="energy")
    assert set(asked) == {"train", "validation"}


class Killed(BaseException):
    """As a signal would end the process: no handler of errors catches it."""


@pytest.mark.parametrize("moment", ["retraining", "weights", "record", "scores"])
@pytest.mark.parametrize("build", ["net", "dense"])
def test_pruning_killed_anywhere_ends_as_the_undisturbed_run(moment, build, data, tmp_path, monkeypatch, request):
    net = request.getfixturevalue(build)
    run = functools.partial(units.prune_units, net, data, stages=2, candidates=[[3, 4], [2]],
                            retrain={"epochs": 2, "optimizer": "sgd", "lr": 0.05})
    undisturbed = run()
    targets = {"retraining": (training.Checkpoint, "on_train_epoch_end"), "weights": (units, "_replace"),
               "record": (units.os, "replace"), "scores": (units, "cluster")}
    owner, name = targets[moment]
    original, calls = getattr(owner, name), []

    def dies(*args, **kwargs):
        calls.append(1)
        result = original(*args, **kwargs)
        if len(calls) == {"retraining": 3, "weights": 3, "record": 9, "scores": 3}[moment]:
            raise Killed
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dies)
        with pytest.raises(Killed):
            run(folder=tmp_path)
    resumed = run(folder=tmp_path)
    assert resumed.kept == undisturbed.kept
    pd.testing.assert_frame_equal(resumed.table, undisturbed.table)
    pd.testing.assert_frame_equal(resumed.scores, undisturbed.scores)
    assert all(torch.equal(a, b) for a, b in zip(resumed.net.state_dict().values(),
                                                 undisturbed.net.state_dict().values(), strict=True))
    again = run(folder=tmp_path)
    pd.testing.assert_frame_equal(again.table, undisturbed.table)


@pytest.mark.parametrize("changed", [{"batch_size": 16}, {"augment": ("cutout",)}, {"seed": 1}])
def test_folder_of_a_run_on_other_batches_is_refused(net, data, tmp_path, changed):
    run = functools.partial(units.prune_units, net, stages=1, candidates=[3], score="norm", folder=tmp_path)
    run(data)
    other = ImageData("digits", **{"device": "cpu", "limit": 400, "validation": 0.25} | changed)
    with pytest.raises(ValueError, match="other settings"):
        run(other)


def test_folder_of_another_or_a_damaged_run_is_refused(net, data, tmp_path):
    run = functools.partial(units.prune_units, net, data, stages=1, score="norm", folder=tmp_path)
    run(candidates=[3])
    with pytest.raises(ValueError, match="other settings"):
        run(candidates=[4])
    content = (tmp_path / "record.json").read_text()
    (tmp_path / "record.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        run(candidates=[3])
    (tmp_path / "record.json").write_text(content)
    (tmp_path / "stage-1.pt").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"stage-1.pt is lost or damaged: delete the folder"):
        run(candidates=[3])
    (tmp_path / "stage-1.pt").unlink()
    with pytest.raises(ValueError, match=r"stage-1.pt is lost or damaged"):
        run(candidates=[3])


def scaled(factor):
    def score(net, data):
        return pd.Series(factor * np.arange(len(net.units), dtype=float))

    return score


@pytest.mark.parametrize(("one", "other"), [
    ({"score": lambda net, data: units.norm_score(net)}, {"score": lambda net, data: 2 * units.norm_score(net)}),
    ({"score": scaled(1)}, {"score": scaled(2)}),
    ({"score": functools.partial(units.random_score, seed=1)}, {"score": functools.partial(units.random_score, seed=2)}),
    ({"retrain": QUICK | {"callbacks": [penalty.L2(0.1)]}}, {"retrain": QUICK | {"callbacks": [penalty.L2(0.2)]}})])
def test_runs_of_other_functions_and_objects_are_told_apart(one, other, net, data, tmp_path):
    run = functools.partial(units.prune_units, net, data, stages=1, candidates=[3], folder=tmp_path)
    first = run(**{"score": "norm"} | copy.deepcopy(one))  # training leaves traces in a callback
    assert run(**{"score": "norm"} | copy.deepcopy(one)).kept == first.kept
    with pytest.raises(ValueError, match="other settings"):
        run(**{"score": "norm"} | other)


def test_what_cannot_be_told_apart_is_refused_before_anything_is_written(net, data, tmp_path):
    with pytest.raises(ValueError, match=r"retrain\['callbacks'\]\[0\]: a folder cannot tell <.*Timer"):
        units.prune_units(net, data, candidates=[3], folder=tmp_path, retrain=QUICK | {"callbacks": [Timer("00:01:00:00")]})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("wrong", "message"), [
    ({"candidates": [7]}, "the network has 6 units"), ({"candidates": [1.5]}, "a share lies between"),
    ({"candidates": []}, "give numbers or shares"), ({"stages": 0}, "stages=0"), ({"decide": "test"}, "test split"),
    ({"compare": "x"}, "'before' or 'after'"), ({"score": "x"}, "use one of fisher"), ({"head": "x"}, "unknown head"),
    ({"tolerance": -0.1}, "tolerance=-0.1"), ({"tolerance": float("nan")}, "tolerance=nan"),
    ({"candidates": 2}, "candidates 2: give numbers"), ({"candidates": [[2], 3]}, "give numbers or shares, or 1 lists"),
    ({"candidates": "ab"}, "candidates 'ab': give numbers"), ({"candidates": ["a"]}, "give numbers"),
    ({"retrain": {"seed": 3}}, "retrain has seed: use epochs, .* the seed is that of prune_units"),
    ({"retrain": {"checkpoint": "x"}}, "retrain has checkpoint"), ({"retrain": {"epoch": 1}}, "retrain has epoch"),
    ({"candidates": np.array([9])}, "candidate k=9"),
    ({"score": lambda net, data: pd.Series([1.0, 2.0])}, r"of \[0, 1\]: let it give .* units 0 to 5"),
    ({"score": lambda net, data: pd.Series(range(8))}, "units 0 to 5"),
    ({"score": lambda net, data: [1.0] * 6}, "gave a list")])
def test_wrong_arguments_of_pruning_are_named(net, data, wrong, message):
    with pytest.raises(ValueError, match=message):
        units.prune_units(net, data, **{"stages": 1, "candidates": [3], "score": "norm"} | wrong)


def test_controls_have_as_many_units_in_each_stage():
    net = nets.resnet(56, width=4)
    kept = [0, 1, 4, 11, 20, 22]
    found = units.controls(net, kept, (3, 32, 32))
    assert found["first"] == [0, 1, 2, 9, 18, 19]
    assert [sum(9 * s <= unit < 9 * s + 9 for unit in found["random"]) for s in range(3)] == [3, 1, 2]
    assert len(found["uniform"]) == 6
    assert units.controls(net, kept, (3, 32, 32), seed=1)["random"] != found["random"]
