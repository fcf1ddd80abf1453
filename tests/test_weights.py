import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fishlib import nets, weights
from fishlib.data import ImageData
from fishlib.training import fit


@pytest.fixture(scope="module")
def data():
    return ImageData("digits", batch_size=64, limit=400)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nets.mlp((1, 8, 8), 10, (12, 8))


def tiny(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def tiny_batch(n=7):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(n, 1, 2, 3, dtype=torch.float64, generator=generator), torch.randint(3, (n,), generator=generator)


def loss_of(net, images, labels, name):
    """The mean loss as a function of one weight tensor."""
    rest = dict(net.named_parameters())
    return lambda w: F.cross_entropy(torch.func.functional_call(net, rest | {name: w}, (images,)), labels)


# -- scores -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("by", ["taylor", "hessian", "woodfisher", "fisher", "fisher_weight"])
def test_scores_equal_their_formula_computed_one_weight_at_a_time(by):
    net, (images, labels) = tiny(), tiny_batch()
    options = {"hessian": {"draws": 1000}, "woodfisher": {"block": 4, "damping": 0.01},
               "fisher": {"kind": "exact"}, "fisher_weight": {"kind": "exact"}}.get(by, {})
    found = weights.score(net, [(images, labels)], by, **options)
    for name, score in found.items():
        expected = slow_score(net, images, labels, name, by)
        tolerance = {"rtol": 0.3, "atol": 5e-4} if by == "hessian" else {"rtol": 1e-6, "atol": 1e-12}
        torch.testing.assert_close(score, expected, **tolerance)


def slow_score(net, images, labels, name, by):
    w = dict(net.named_parameters())[name].detach()
    if by == "taylor":
        return (torch.func.grad(loss_of(net, images, labels, name))(w) * w).square()
    if by == "hessian":
        h = torch.func.hessian(loss_of(net, images, labels, name))(w).reshape(w.numel(), w.numel()).diagonal()
        return w.square() * h.view_as(w).clamp_min(0) / 2
    if by in ("fisher", "fisher_weight"):
        chances = net(images).softmax(1).detach()
        squares = sum(chances[i, c] * torch.func.grad(loss_of(net, images[i : i + 1], torch.tensor([c]), name))(w).square()
                      for i in range(len(images)) for c in range(3))
        return squares / len(images) * (1 if by == "fisher" else w.square() / 2)
    one_by_one = [torch.func.grad(loss_of(net, images[i : i + 1], labels[i : i + 1], name))(w).flatten()
                  for i in range(len(images))]
    gradients = F.pad(torch.stack(one_by_one), (0, -w.numel() % 4))
    full = gradients.T @ gradients / len(images)
    level = 0.01 * full.diagonal().mean()
    diagonal = torch.cat([torch.linalg.inv(full[b : b + 4, b : b + 4] + level * torch.eye(4, dtype=w.dtype)).diagonal()
                          for b in range(0, len(full), 4)])[: w.numel()]
    return w.square() / (2 * diagonal.view_as(w))

@pytest.mark.parametrize("by", ["taylor", "hessian", "woodfisher", "fisher"])
def test_scores_of_uneven_batches_are_those_of_all_their_images(by):
    net, (images, labels) = tiny(), tiny_batch()
    parts = [(images[:2], labels[:2]), (images[2:], labels[2:])]
    options = {"hessian": {"draws": 1000}, "woodfisher": {"block": 4, "damping": 0.01}, "fisher": {"kind": "exact"}}.get(by, {})
    for name, score in weights.score(net, parts, by, **options).items():
        expected = slow_score(net, images, labels, name, by)
        if by == "taylor":  # squares of the gradients of batches, not of images
            expected = sum(slow_score(net, *part, name, by) for part in parts) / 2
        tolerance = {"rtol": 0.3, "atol": 5e-4} if by == "hessian" else {"rtol": 1e-6, "atol": 1e-12}
        torch.testing.assert_close(score, expected, **tolerance)


def test_as_many_images_as_asked_for_are_scored_the_first_ones_of_the_training_split(net, data):
    images, labels = (part[:300] for part in data.split("train"))
    batches = list(zip(images.split(100), labels.split(100), strict=True))
    for samples in (70, 130, 1000):
        first = [(images[:samples], labels[:samples])]
        expected = weights.score(net, first, "fisher", kind="empirical")
        found = weights.score(net, batches, "fisher", samples=samples, kind="empirical")
        for name, score in expected.items():
            torch.testing.assert_close(found[name], score)
    found = weights.score(net, data, "fisher", samples=300, kind="empirical")
    for name, score in weights.score(net, [(images, labels)], "fisher", kind="empirical").items():
        torch.testing.assert_close(found[name], score)


def test_scoring_changes_neither_the_network_nor_the_random_state(net, data):
    before, mode, state = copy.deepcopy(net.state_dict()), net.training, torch.get_rng_state()
    for by in weights.SCORES:
        weights.score(net, data, by, samples=64)
    assert net.training == mode
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_scores_repeat_with_their_seed(net, data):
    for by in ("random", "fisher", "hessian"):
        first, again, other = (weights.score(net, data, by, samples=64, seed=seed) for seed in (3, 3, 4))
        assert all(torch.equal(first[k], again[k]) for k in first)
        assert any(not torch.equal(first[k], other[k]) for k in first)


def test_removed_weights_score_lowest_and_stay_removed(net, data):
    half = weights.prune(net, weights.score(net, data, "magnitude"), 0.5)
    for by in weights.SCORES:
        more = weights.prune(half, weights.score(half, data, by, samples=64), 0.7)
        assert not any((new & ~old).any() for old, new in zip(
            weights.masks(half).values(), weights.masks(more).values(), strict=True))


class Partial(nn.Module):
    """`tiny` with a layer that does not run."""

    def __init__(self):
        super().__init__()
        self.net, self.idle = tiny(), nn.Linear(6, 5).double()

    def forward(self, images):
        return self.net(images)


@pytest.mark.parametrize("by", weights.SCORES)
def test_frozen_layers_score_as_trained_ones(by):
    net, batch = tiny(), tiny_batch()
    expected = weights.score(net, [batch], by)
    net[1].requires_grad_(False)
    found = weights.score(net, [batch], by)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [p.requires_grad for p in net.parameters()] == [False, False, True, True]


@pytest.mark.parametrize("by", [by for by in weights.SCORES if by not in ("magnitude", "random")])
def test_layers_that_do_not_run_score_nothing_and_the_others_as_ever(by):
    net, batch = Partial(), tiny_batch()
    found, expected = weights.score(net, [batch], by), weights.score(net.net, [batch], by)
    if by != "woodfisher":  # in whose blocks the damping alone is left
        assert not found["idle.weight"].any()
    if by != "hessian":  # its signs are drawn for all layers
        assert all(torch.equal(found[f"net.{name}"], score) for name, score in expected.items())


class Twice(nn.Module):
    """A layer that runs twice, by one name or as two modules of one tensor."""

    def __init__(self, names):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.out = nn.Linear(6, 6), nn.Linear(6, 3)
        if names == 2:
            self.b = nn.Linear(6, 6)
            self.b.weight, self.b.bias = self.a.weight, self.a.bias
        self.double()

    def forward(self, images):
        return self.out(getattr(self, "b", self.a)(torch.tanh(self.a(images.flatten(1)))))


@pytest.mark.parametrize("by", ["fisher", "fisher_weight", "woodfisher"])
def test_a_weight_of_two_layers_scores_as_one_that_is_used_twice(by):
    batch = tiny_batch()
    found, expected = (weights.score(Twice(names), [batch], by) for names in (2, 1))
    assert list(found) == list(expected)
    for name, score in expected.items():
        torch.testing.assert_close(found[name], score)


def test_an_unknown_score_names_the_known_ones(net, data):
    with pytest.raises(ValueError, match="fisher_weight"):
        weights.score(net, data, "fischer")


# -- decisions --------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4), sparsity=st.floats(0, 0.99), seed=st.integers(0, 999))
def test_select_keeps_the_highest_and_exactly_as_many_as_asked(sizes, sparsity, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = {str(i): torch.randint(5, (n,), generator=generator).float() for i, n in enumerate(sizes)}
    total = sum(sizes)
    masks = weights.select(scores, sparsity, allow_empty=True)
    assert sum(int(m.sum()) for m in masks.values()) == total - round(sparsity * total)
    kept = torch.cat([scores[k][masks[k]] for k in scores])
    gone = torch.cat([scores[k][~masks[k]] for k in scores])
    assert not len(kept) or not len(gone) or kept.min() >= gone.max()

def test_among_equal_scores_the_later_weights_go_first():
    masks = weights.select({"a": torch.ones(3), "b": torch.ones(4)}, 3 / 7, allow_empty=True)
    assert masks["a"].tolist() == [True] * 3
    assert masks["b"].tolist() == [True, False, False, False]


def test_layer_scope_takes_the_same_share_of_each_layer():
    scores = {"a": torch.rand(10, 10), "b": 100 + torch.rand(40)}
    masks = weights.select(scores, 0.9, "layer")
    assert [int(m.sum()) for m in masks.values()] == [10, 4]


def test_no_layer_is_emptied_unless_asked():
    scores = {"small": torch.rand(5), "large": 10 + torch.rand(95)}
    assert weights.select(scores, 0.9)["small"].sum() == 1
    assert weights.select(scores, 0.9)["small"].int().argmax() == scores["small"].argmax()
    assert weights.select(scores, 0.9, allow_empty=True)["small"].sum() == 0


@pytest.mark.parametrize(("sparsity", "scope"), [(1.0, "global"), (-0.1, "global"), (0.99, "global"), (0.5, "row")])
def test_an_impossible_request_is_refused(sparsity, scope):
    with pytest.raises(ValueError, match="use"):
        weights.select({"a": torch.rand(50), "b": torch.rand(50)}, sparsity, scope)


def test_scores_that_are_not_numbers_are_refused():
    with pytest.raises(ValueError, match="not numbers"):
        weights.select({"a": torch.tensor([1.0, torch.nan])}, 0.5)


def test_a_mask_of_another_network_is_refused(net):
    with pytest.raises(ValueError, match="no prunable weight"):
        weights.apply(net, {"9.weight": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="shape"):
        weights.apply(net, {"1.weight": torch.ones(2, 2)})


# -- masks ------------------------------------------------------------------------------------------------------------

def test_masks_hold_through_training_and_leave_the_original_alone(net, data):
    before = copy.deepcopy(net.state_dict())
    pruned = weights.prune(net, weights.score(net, data, "magnitude"), 0.8)
    trained, _ = fit(pruned, data, epochs=2)
    assert weights.sparsity(trained) == weights.sparsity(pruned) == pytest.approx(0.8, abs=1e-3)
    for name, mask in weights.masks(trained).items():
        assert (weights.values(trained)[name][~mask] == 0).all()
        assert not torch.equal(weights.values(trained)[name], weights.values(pruned)[name])
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_a_plain_copy_computes_the_same_and_leaves_the_masked_network_working(net, data):
    pruned = weights.prune(net, weights.score(net, data, "magnitude"), 0.8)
    images, _ = data.split("validation")
    outputs = pruned(images)
    plain = weights.plain(pruned)
    assert list(plain.state_dict()) == list(net.state_dict())
    assert torch.equal(plain(images), outputs)
    assert torch.equal(pruned(images), outputs)


def test_masks_apply_to_a_network_that_has_some(net):
    first = {name: torch.rand(w.shape) < 0.5 for name, w in weights.values(net).items()}
    second = {name: torch.rand(w.shape) < 0.5 for name, w in weights.values(net).items()}
    both = weights.apply(weights.apply(net, first), second)
    assert all(torch.equal(weights.masks(both)[k], second[k]) for k in second)
    assert all(len(layer.parametrizations.weight) == 1 for layer in weights.prunable(both).values())


def test_straight_masks_let_removed_weights_learn(net, data):
    masks = {name: torch.rand(w.shape) < 0.5 for name, w in weights.values(net).items()}
    images, labels = data.split("validation")
    for straight in (False, True):
        masked = weights.apply(net, masks, straight)
        F.cross_entropy(masked(images), labels).backward()
        for name, layer in weights.prunable(masked).items():
            gradient = layer.parametrizations.weight.original.grad
            assert bool((gradient[~masks[name]] != 0).any()) is straight


def test_summary_counts_what_is_left(net):
    table = weights.summary(weights.apply(net, {"1.weight": torch.zeros(12, 64)}))
    assert table.kept.tolist() == [0, 96, 80, 176]
    assert table.share.iloc[-1] == 176 / (12 * 64 + 96 + 80)


# -- dead ends --------------------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.5, 0.97))
def test_dead_ends_are_exactly_the_weights_without_gradient_and_their_removal_changes_nothing(seed, share):
    torch.manual_seed(seed)
    net = nets.mlp((1, 4, 4), 3, (7, 6)).double()
    scores = {name: torch.rand(w.shape) for name, w in weights.values(net).items()}
    pruned = weights.plain(weights.prune(net, scores, share, allow_empty=True))
    cleaned = weights.without_dead_ends(pruned, (1, 4, 4))
    images = torch.rand(50, 1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(cleaned(images), pruned(images), rtol=1e-12, atol=1e-12)
    w1, b1, w2, b2, w3, _ = (p.detach() for p in cleaned.parameters())
    unread = (w2 != 0).sum(0) == 0
    assert (w1[unread] == 0).all() and (b1[unread] == 0).all()  # noqa: PT018
    unread = (w3 != 0).sum(0) == 0
    assert (w2[unread] == 0).all() and (b2[unread] == 0).all()  # noqa: PT018
    silent = ((w1 != 0).sum(1) == 0) & (b1 == 0)
    assert (w2[:, silent] == 0).all()


def test_dead_ends_of_a_convolutional_network_change_nothing():
    torch.manual_seed(0)
    net = nets.lenet5()
    pruned = weights.plain(weights.prune(net, weights.score(net, [], "magnitude"), 0.99))
    cleaned = weights.without_dead_ends(pruned, (1, 28, 28))
    images = torch.rand(20, 1, 28, 28)
    torch.testing.assert_close(cleaned(images), pruned(images))
    assert weights.sparsity(cleaned) > weights.sparsity(pruned)


# -- during training --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("by", list(weights.RUNNING))
@pytest.mark.parametrize("regrow", [False, True])
def test_pruning_during_training_ends_at_the_sparsity_asked(net, data, by, regrow):
    trained, history = fit(net, data, epochs=3, callbacks=[weights.Pruning(0.9, by, regrow=regrow)])
    assert weights.sparsity(trained) == pytest.approx(0.9, abs=1e-3)
    assert len(history) == 3
    assert not weights.masks(net)


class Watch(weights.L.Callback):
    def __init__(self):
        self.shares, self.masks = [], []

    def on_train_batch_end(self, trainer, module, *_):
        self.shares.append(weights.sparsity(module.net))
        self.masks.append(torch.cat([m.flatten() for m in weights.masks(module.net).values()]).clone())


def test_the_share_removed_follows_the_cubic_schedule(net, data):
    watch = Watch()
    fit(net, data, epochs=4, callbacks=[weights.Pruning(0.9, start=0.25, end=0.75, updates=1000), watch])
    steps = len(watch.shares)
    for step, share in enumerate(watch.shares, start=1):
        progress = min(1, max(0, (step - round(0.25 * steps)) / (round(0.75 * steps) - round(0.25 * steps))))
        assert share == pytest.approx(0.9 * (1 - (1 - progress) ** 3), abs=2e-3)


def test_pruning_goes_on_from_what_is_removed_already(net, data):
    half = weights.hold_zeros(weights.plain(weights.prune(net, weights.score(net, data, "magnitude"), 0.5)))
    watch = Watch()
    more, _ = fit(half, data, epochs=2, callbacks=[weights.Pruning(0.8), watch])
    assert watch.shares[0] == pytest.approx(0.5, abs=1e-3)
    assert weights.sparsity(more) == pytest.approx(0.8, abs=1e-3)
    with pytest.raises(ValueError, match="already"):
        fit(more, data, epochs=1, callbacks=[weights.Pruning(0.6)])

@pytest.mark.parametrize("regrow", [False, True])
def test_scores_during_training_are_their_formulas_of_adams_averages(regrow):
    images, labels = tiny_batch()
    kept = torch.rand(5, 6, generator=torch.Generator().manual_seed(0)) < 0.6
    net = weights.apply(tiny(), {"1.weight": kept}, straight=regrow)
    optimizer = torch.optim.Adam(net.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
    original = net[1].parametrizations.weight.original
    m, v = (optimizer.state[original][key] for key in ("exp_avg", "exp_avg_sq"))
    w = original.detach() if regrow else original.detach() * kept
    expected = {"magnitude": w.abs(), "fisher_weight": w**2 * v / 2, "fisher": v, "taylor": (w * m) ** 2}
    for by, score in expected.items():
        if not regrow and by != "magnitude":
            score = torch.where(kept, score, -1.0)
        torch.testing.assert_close(weights.RUNNING[by](net[1], optimizer, regrow).detach(), score)


def test_removed_weights_come_back_only_with_regrowth(net, data):
    for regrow in (False, True):
        watch = Watch()
        fit(net, data, epochs=4, lr=0.01, callbacks=[weights.Pruning(0.8, regrow=regrow), watch])
        back = any((later & ~earlier).any() for earlier, later in zip(watch.masks, watch.masks[1:], strict=False))
        assert back is regrow


def test_a_score_of_ones_own_decides_during_training(net, data):
    def first(net):
        return {name: torch.arange(w.numel(), 0, -1.0).view_as(w) for name, w in weights.values(net).items()}

    trained, _ = fit(net, data, epochs=2, callbacks=[weights.Pruning(0.5, first, scope="layer")])
    assert all(mask.flatten()[: mask.numel() // 2].all() for mask in weights.masks(trained).values())


def test_scores_from_adam_need_adam(net, data):
    with pytest.raises(ValueError, match="Adam"):
        fit(net, data, epochs=2, optimizer="sgd", callbacks=[weights.Pruning(0.5, "fisher")])


@pytest.mark.parametrize("options", [{"sparsity": 1.0}, {"sparsity": 0.5, "by": "fischer"},
                                     {"sparsity": 0.5, "start": 0.7, "end": 0.3}])
def test_pruning_checks_its_settings(options):
    with pytest.raises(ValueError, match="use"):
        weights.Pruning(**options)


def test_rewinding_starts_every_round_from_the_early_weights(net, data):
    starts = []

    def train(one):
        starts.append(weights.values(one))
        return fit(one, data, epochs=1)[0]

    last = weights.rewind(net, train, lambda one: weights.score(one, data, "magnitude"), 0.75, rounds=2)
    assert weights.sparsity(last) == pytest.approx(0.75, abs=1e-3)
    for begin in starts:
        for name, w in begin.items():
            assert torch.equal(w[w != 0], weights.values(net)[name][w != 0])
    assert [round(1 - torch.cat([w.flatten() for w in s.values()]).count_nonzero().item() / 944, 2) for s in starts] == [
        0, 0.5, 0.75]


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AdaptiveMaxPool2d(1)])
def test_weights_behind_which_another_maximum_hides_are_no_dead_ends(pool):
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.Conv2d(2, 1, 1, bias=False), nn.ReLU(), pool,
                        nn.Flatten(), nn.Linear(1, 2)).double()
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].weight[0, 0, 0, 0] = net[0].weight[1, 0, 2, 2] = 1  # each alone reaches one corner of the map
        net[1].weight.fill_(1)
    images = torch.rand(5, 1, 2, 2, dtype=torch.float64)
    assert torch.equal(weights.without_dead_ends(net, (1, 2, 2))(images), net(images))


@pytest.mark.parametrize("by", ["taylor", "hessian", "fisher", "woodfisher"])
def test_a_score_without_images_is_refused(net, by):
    with pytest.raises(ValueError, match="needs images, and there are none"):
        weights.score(net, iter(()), by)


def test_pruning_goes_on_at_the_share_that_is_gone_and_reaches_its_share_in_few_steps(data, net):
    pruned = weights.prune(net, weights.score(net, data, "magnitude"), 0.98)
    fit(pruned, data, epochs=1, callbacks=[weights.Pruning(0.98)])
    few = ImageData(limit=120, batch_size=32)
    short, _ = fit(net, few, epochs=1, callbacks=[weights.Pruning(0.5, start=0.5, end=0.6)])
    assert abs(weights.summary(short).share.iloc[-1] - 0.5) < 1e-3


class Shared(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.flat, self.a, self.b, self.out = nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.out(self.b(self.a(self.flat(x)).relu()).relu())


def test_a_weight_of_two_layers_is_refused_for_a_mask_would_hold_in_one_alone(data):
    net = Shared()
    with pytest.raises(ValueError, match=r"a.weight and b.weight are one weight"):
        weights.prune(net, weights.score(net, data, "magnitude"), 0.5)
    with pytest.raises(ValueError, match=r"a.weight and b.weight are one weight"):
        fit(net, data, epochs=1, callbacks=[weights.Pruning(0.5)])


def test_layers_that_never_run_and_frozen_ones_may_stand_beside_dead_ends():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    net[1].requires_grad_(False)
    net.idle = nn.Linear(3, 3)
    with torch.no_grad():
        net[3].weight[:, 0] = 0
        found = weights.without_dead_ends(Running(net), (1, 2, 2))
    assert not found.net[1].weight[0].any()
    assert found.net[1].weight[1:].all()
    assert not found.net.idle.weight.any()


class Running(nn.Module):
    """The first four layers of a sequence."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net[3](self.net[2](self.net[1](self.net[0](x))))
