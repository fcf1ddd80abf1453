import copy
import itertools
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fishlib import codec, nets, weights
from fishlib.codec import CompressedFileError
from fishlib.data import ImageData
from fishlib.training import evaluate, fit


@pytest.fixture(scope="module")
def data():
    return ImageData("digits", batch_size=64, limit=400)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nets.mlp((1, 8, 8), 10, (12, 8))


def sparse(net, share=0.8, bits=3, seed=0):
    scores = weights.score(net, [], "random", seed=seed)
    return codec.quantize(weights.prune(net, scores, share), bits)


def identical(a, b):
    return list(a.state_dict()) == list(b.state_dict()) and all(
        x.dtype == y.dtype and x.shape == y.shape and codec._bytes(x) == codec._bytes(y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# -- quantisers -------------------------------------------------------------------------------------------------------

@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 9999), bits=st.integers(2, 6), n=st.integers(1, 60), zeros=st.booleans())
def test_quantisers_keep_zeros_and_take_no_more_values_than_their_bits(seed, bits, n, zeros):
    weight = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weight[: n // 2] *= not zeros
    for name, quantiser in codec.QUANTIZERS.items():
        rounded = quantiser(weight, bits)
        assert (rounded[weight == 0] == 0).all()
        assert len(rounded[rounded != 0].unique()) <= 2**bits
        if name != "kmeans":
            largest = weight.abs().max()
            step = largest / (2 ** (bits - 1) - 1) * (1 if name == "uniform" else 2)
            assert (rounded - weight).abs().max() <= step / 2 + 1e-12


def test_fixed_point_steps_are_powers_of_two():
    rounded = codec.fixed_point(torch.randn(100, dtype=torch.float64), 5)
    step = rounded[rounded != 0].abs().min()
    assert (rounded / 2.0 ** torch.log2(step).floor() % 1 == 0).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9999), weighted=st.booleans())
def test_kmeans_is_a_fixed_point_of_lloyds_algorithm(seed, weighted):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(80, generator=generator, dtype=torch.float64)
    importance = torch.rand(80, generator=generator, dtype=torch.float64) + 0.01 if weighted else torch.ones(80)
    labels, centroids = codec.cluster(weight, 4, importance if weighted else None)
    for k in labels.unique().tolist():
        members = labels == k
        mean = (importance * weight)[members].sum() / importance[members].sum()
        assert centroids[k - 1] == pytest.approx(mean.item(), abs=2e-3)
    assert torch.equal(labels - 1, (weight[:, None] - centroids).abs().argmin(1)) or weighted


def test_fisher_weighted_kmeans_has_the_lower_weighted_error():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2000, generator=generator)
    importance = torch.rand(2000, generator=generator) ** 8
    error = {}
    for chosen in (None, importance):
        error[chosen is None] = (importance * (weight - codec.kmeans(weight, 3, chosen)).square()).sum()
    assert error[False] < error[True]


def test_quantising_names_what_it_knows(net):
    with pytest.raises(ValueError, match="kmeans"):
        codec.quantize(net, 3, "k-means")
    with pytest.raises(ValueError, match="bits"):
        codec.quantize(net, 1, "uniform")
    with pytest.raises(ValueError, match="importance"):
        codec.quantize(net, 3, "uniform", importance=weights.values(net))


@pytest.mark.parametrize("by", codec.QUANTIZERS)
def test_bits_are_whole_numbers_of_any_integer_type(net, by):
    expected = codec.quantize(net, 3, by)
    for bits in (np.int64(3), np.uint8(3), torch.tensor(3), dict.fromkeys(weights.prunable(net), np.int32(3)),
                 pd.Series(3, index=list(weights.prunable(net)))):
        assert identical(codec.quantize(net, bits, by), expected)
    for bits in (3.0, 2.5, True, "3", None, dict.fromkeys(weights.prunable(net), 2.5)):
        with pytest.raises(ValueError, match=r"bits=\S+: this quantiser takes a whole number from [12] to 16 bits"):
            codec.quantize(net, bits, by)
        if not isinstance(bits, dict):
            with pytest.raises(ValueError, match="whole number"):
                codec.QUANTIZERS[by](torch.ones(3), bits)


def test_weights_that_bits_or_importance_lack_are_named(net):
    with pytest.raises(ValueError, match=r"bits lacks 1\.weight, 5\.weight: give"):
        codec.quantize(net, {"1.weigh": 3, "3.weight": 3})
    with pytest.raises(ValueError, match=r"importance lacks 3\.weight, 5\.weight: give"):
        codec.quantize(net, 3, importance={"1.weight": torch.ones(12, 64)})


def test_a_folder_that_a_compressed_file_lacks_is_named(net, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.fish: there is no folder .*nodir: make it first"):
        codec.compress(net, tmp_path / "nodir" / "x.fish")


def test_quantising_leaves_the_network_alone(net):
    before = copy.deepcopy(net.state_dict())
    rounded = codec.quantize(net, {"1.weight": 2, "3.weight": 3, "5.weight": 4})
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert [len(w.unique()) for w in weights.values(rounded).values()] == [4, 8, 16]


# -- bits by information ----------------------------------------------------------------------------------------------

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999), average=st.floats(2, 6), falling=st.booleans())
def test_no_other_bits_within_the_budget_have_a_smaller_divergence(seed, average, falling):
    random = np.random.default_rng(seed)
    sizes = random.integers(0, 50, 4)
    prices = random.random((4, 1)) * 4.0 ** -np.arange(2, 7) if falling else random.random((4, 5))
    costs = pd.DataFrame(prices, columns=range(2, 7), index=list("abcd")).assign(size=sizes)

    def divergence(bits):
        return sum(prices[i, b - 2] for i, b in enumerate(bits))

    affordable = [bits for bits in itertools.product(range(2, 7), repeat=4) if sizes @ bits <= average * sizes.sum() + 1e-9]
    bits = codec.allocate(costs, average)
    assert list(bits) == list("abcd")
    assert tuple(bits.values()) in affordable
    assert divergence(bits.values()) == pytest.approx(min(map(divergence, affordable)), rel=1e-12)


def test_a_layer_that_holds_most_weights_is_not_crowded_out_by_small_ones():
    # One bit after the other where it buys most, the small layer would be filled first, and the large one's bit not fit.
    costs = pd.DataFrame({"size": [90, 10], 2: [8.0, 4.0], 3: [2.0, 1.0], 4: [0.5, 0.25]}, index=["large", "small"])
    assert codec.allocate(costs, 3.0) == {"large": 3, "small": 3}


def test_an_average_below_the_fewest_bits_is_refused():
    with pytest.raises(ValueError, match="2 bits"):
        codec.allocate(pd.DataFrame({"size": [1], 2: [1.0]}, index=["a"]), 1.5)


def test_the_divergence_cost_is_half_the_fisher_weighted_error():
    weight, fisher = {"a": torch.randn(30)}, {"a": torch.rand(30)}
    table = codec.divergence_costs(weight, fisher, (2, 5))
    triples = zip(fisher["a"], weight["a"], codec.uniform(weight["a"], 5), strict=True)
    expected = 0.5 * sum(f * (w - q) ** 2 for f, w, q in triples)
    assert table.loc["a", 5] == pytest.approx(float(expected), rel=1e-5)


def test_tus_procedure_prunes_and_gives_more_bits_to_informative_clusters(net, data):
    fisher = weights.score(net, data, "fisher", kind="exact")
    rounded, bits = codec.tu(net, fisher, 0.5, average=4.0)
    assert weights.sparsity(rounded) == pytest.approx(0.5, abs=0.02)
    assert bits[4] >= bits[1]
    assert bits[4] > 2


# -- during training --------------------------------------------------------------------------------------------------
def test_tus_procedure_on_eight_weights_is_that_by_hand():
    net = nn.Linear(8, 1)
    w = torch.tensor([1.0, 2.0, 3.1, 4.2, 5.3, 6.4, 7.0, 8.0])
    net.weight.data = w[None]
    fisher = torch.tensor([100.0, 100, 1, 1.1, 10, 11, 0.01, 0.02])
    # The two smallest go first, then the two of least information; F = 1, whose logarithm is 0, is kept.
    parts, informations = {"1": w[2:4], "2": w[4:6]}, {"1": fisher[2:4], "2": fisher[4:6]}
    bits = codec.allocate(codec.divergence_costs(parts, informations, by="fixed_point"), 5.0)
    rounded, found = codec.tu(net, {"weight": fisher[None]}, 0.5, average=5.0, clusters=2, small=0.5)
    assert found == {1: bits["1"], 2: bits["2"]}
    assert bits["2"] > bits["1"]
    kept = torch.cat([codec.fixed_point(part, bits[g]) for g, part in parts.items()])
    assert torch.equal(rounded.weight[0], torch.cat([torch.zeros(2), kept, torch.zeros(2)]))


def test_rounded_weights_train_through_the_rounding(net, data):
    before = copy.deepcopy(net.state_dict())
    trained, history = fit(net, data, epochs=6, callbacks=[codec.RoundedWeights(3)])
    assert all(len(w.unique()) <= 7 for w in weights.values(trained).values())
    assert history.train_loss.iloc[-1] < history.train_loss.iloc[0]
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())

class Steps(codec.L.Callback):
    """The step that trains, and whether the first layer's weights take few values then."""

    def __init__(self):
        self.few = []

    def on_train_batch_end(self, trainer, module, *_):
        self.few.append(len(weights.values(module.net)["1.weight"].unique()) <= 9)


def test_weights_are_rounded_from_the_stated_share_of_the_training_on(net, data):
    steps = Steps()
    fit(net, data, epochs=4, callbacks=[codec.RoundedWeights(3, start=0.25), steps])
    assert steps.few == [step >= 0.25 * len(steps.few) for step in range(len(steps.few))]


def test_clusters_are_formed_at_the_start_and_again_over_the_rest_of_the_training(net, data, monkeypatch):
    steps, formed, assign = Steps(), [], codec.Shared.assign
    monkeypatch.setattr(codec.Shared, "assign", lambda self, *given: (formed.append(len(steps.few)), assign(self, *given))[1])
    fit(net, data, epochs=4, callbacks=[steps, codec.SharedWeights(3, bias_bits=None, start=0.5, rounds=2)])
    total = len(steps.few)
    assert sorted(set(formed)) == [round(0.5 * total), round(0.75 * total)]
    assert steps.few == [step >= round(0.5 * total) for step in range(total)]


def test_shared_weights_take_few_values_and_train_them(net, data):
    seen = []

    class Watch(codec.L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            seen.append(weights.values(module.net)["1.weight"].unique())

    trained, _ = fit(net, data, epochs=4, callbacks=[
        weights.Pruning(0.6), codec.SharedWeights(3, bias_bits=2, start=0.8, rounds=1), Watch()])
    final = weights.plain(trained)
    assert weights.sparsity(trained) >= 0.599
    for name, parameter in final.named_parameters():
        assert len(parameter[parameter != 0].unique()) <= (8 if name.endswith("weight") else 4)
        assert torch.equal(parameter, parameter.half().float())
    shared = [values for values in seen if len(values) <= 9]
    assert len(shared) > 3
    assert not torch.equal(shared[0], shared[-1])


def test_the_gradient_of_shared_values_is_the_mean_of_their_members():
    weight = torch.tensor([0.0, 1.0, 1.5, -2.0, -2.5, 1.25], dtype=torch.float64, requires_grad=True)
    shared = codec.Shared(weight)
    assert torch.equal(shared(weight), weight)
    shared.assign(weight.detach(), 2)
    assert shared(weight).tolist() == [0.0, 1.25, 1.25, -2.25, -2.25, 1.25]
    gradient = torch.tensor([9.0, 1, 2, 3, 4, 6], dtype=torch.float64)
    shared(weight).backward(gradient)
    assert weight.grad.tolist() == [0, 3, 3, 3.5, 3.5, 3]


def test_pruned_and_shared_networks_can_be_trained_again(net, data):
    callbacks = [weights.Pruning(0.5), codec.SharedWeights(3)]
    once, _ = fit(net, data, epochs=2, callbacks=callbacks)
    kept = weights.masks(once)
    again, _ = fit(once, data, epochs=2, callbacks=[codec.SharedWeights(2)])
    assert all(torch.equal(a, b) for a, b in zip(kept.values(), weights.masks(again).values(), strict=True))
    assert all(len(w[w != 0].unique()) <= 4 for w in weights.values(again).values())
    assert evaluate(once, data).accuracy == evaluate(weights.plain(once), data).accuracy


@pytest.mark.parametrize("make", [lambda: codec.RoundedWeights(3, "nearest"), lambda: codec.RoundedWeights(1),
                                  lambda: codec.SharedWeights(3, start=1.0), lambda: codec.SharedWeights(3, importance="w")])
def test_callbacks_check_their_settings(make):
    with pytest.raises(ValueError, match=r"use|takes"):
        make()


# -- the file ---------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 9999), share=st.floats(0, 0.97), bits=st.integers(1, 6))
def test_a_file_decodes_to_the_same_bits(tmp_path_factory, seed, share, bits):
    torch.manual_seed(seed)
    shape = [(1, 4, 4), (1, 5, 3), (2, 3, 3)][seed % 3]
    net = sparse(nets.mlp(shape, 3 + seed % 4, (9, 5)), share, bits, seed)
    path = tmp_path_factory.mktemp("file") / "net.fish"
    sizes = codec.compress(net, path)
    assert sizes.sum() == path.stat().st_size
    torch.manual_seed(seed + 1)
    loaded = codec.load(path, nets.mlp(shape, 3 + seed % 4, (9, 5)))
    assert identical(loaded, net)


@pytest.mark.parametrize("make", [nets.lenet5, lambda: nets.resnet(8), nets.small_cnn, lambda: nn.Linear(3, 2).double(),
                                  lambda: nn.Linear(3, 2).bfloat16(), lambda: nn.ReLU()])
def test_any_network_survives_the_file(make, tmp_path):
    torch.manual_seed(0)
    for net in (make(), codec.quantize(make(), 4)) if any(weights.prunable(make())) else (make(),):
        codec.compress(net, tmp_path / "net.fish")
        assert identical(codec.load(tmp_path / "net.fish", make()), net)


def test_odd_values_survive_the_file(tmp_path):
    net = nn.Linear(20, 20)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([0.0, -0.0, torch.nan, torch.inf, 1e-40, 70000.0, 0.1, 1.0]).repeat(50).view(20, 20))
    codec.compress(net, tmp_path / "net.fish")
    assert identical(codec.load(tmp_path / "net.fish", nn.Linear(20, 20)), net)


def test_what_the_file_cannot_hold_is_refused_by_name(tmp_path):
    net = nn.Linear(2, 2)
    net.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="phase"):
        codec.compress(net, tmp_path / "net.fish")
    assert not list(tmp_path.iterdir())


def test_shared_tensors_are_stored_once(tmp_path):
    def make():
        layer = nn.Linear(64, 64)
        return nn.Sequential(layer, nn.ReLU(), layer)

    net = make()
    codec.compress(net, tmp_path / "net.fish")
    assert (tmp_path / "net.fish").stat().st_size < 1.1 * 4 * (64 * 64 + 64)
    loaded = codec.load(tmp_path / "net.fish", make())
    assert identical(loaded, net)
    assert loaded[0].weight is loaded[2].weight


def test_masks_count_as_applied_and_outputs_agree_to_the_bit(net, data, tmp_path):
    trained, _ = fit(net, data, epochs=2, callbacks=[weights.Pruning(0.8), codec.SharedWeights(3)])
    codec.compress(trained, tmp_path / "net.fish")
    images, _ = data.split("test")
    assert torch.equal(codec.load(tmp_path / "net.fish", net)(images), trained(images))
    assert torch.equal(codec.load(tmp_path / "net.fish", trained)(images), trained(images))


def test_a_fresh_process_decodes_the_same_weights(net, tmp_path):
    rounded = sparse(net)
    codec.compress(rounded, tmp_path / "net.fish")
    program = ("from fishlib import codec, nets; import sys;"
               "net = codec.load(sys.argv[1], nets.mlp((1, 8, 8), 10, (12, 8)));"
               "print(codec._content(codec._tensors(net)))")
    printed = subprocess.run([sys.executable, "-c", program, tmp_path / "net.fish"], capture_output=True, text=True, check=True)
    assert int(printed.stdout) == codec._content(codec._tensors(rounded))


def test_sizes_are_near_the_entropy(tmp_path):
    torch.manual_seed(0)
    net = sparse(nets.lenet300(), 0.98, 3)
    sizes = codec.compress(net, tmp_path / "net.fish")
    positions, values = 0.0, 0.0
    for w in weights.values(net).values():
        share = w.count_nonzero().item() / w.numel()
        positions -= w.numel() * (share * np.log2(share) + (1 - share) * np.log2(1 - share)) / 8
        counts = w[w != 0].unique(return_counts=True)[1].double()
        values -= (counts * (counts / counts.sum()).log2()).sum().item() / 8
    assert sizes["positions"] < 1.05 * positions + 8
    assert sizes["values"] < 1.01 * values + 8
    assert codec.ratio(tmp_path / "net.fish", net) == 4 * 266_610 / sizes.sum()


def test_structure_in_the_positions_makes_the_file_smaller(tmp_path):
    generator = torch.Generator().manual_seed(0)
    busy = (torch.rand(300, 1, generator=generator) < 0.2) & (torch.rand(1, 784, generator=generator) < 0.3)
    chosen = busy & (torch.rand(300, 784, generator=generator) < 0.3)
    scattered = chosen.flatten()[torch.randperm(300 * 784, generator=generator)].view(300, 784)
    sizes = []
    for mask in (chosen, scattered):
        net = nn.Linear(784, 300, bias=False)
        with torch.no_grad():
            net.weight.copy_(mask.float())
        sizes.append(codec.compress(net, tmp_path / "net.fish")["positions"])
    assert sizes[0] < 0.7 * sizes[1]


def test_dead_units_cost_little_in_the_next_layer(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 10))
    with torch.no_grad():
        alive = torch.rand(400) < 0.1
        net[0].weight.copy_(torch.where(alive[:, None], 0.5, 0.0) * (torch.rand(400, 20) < 0.3))
        following = torch.where(net[0].weight.any(1), 0.5, 0.0) * (torch.rand(10, 400) < 0.6)
        net[2].weight.copy_(following)
    both = codec.compress(net, tmp_path / "net.fish")["positions"]
    with torch.no_grad():
        net[2].weight.copy_(following[:, torch.randperm(400)])
    assert both < codec.compress(net, tmp_path / "net.fish")["positions"]


# -- damage -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    torch.manual_seed(0)
    net = sparse(nets.mlp((1, 8, 8), 10, (12, 8)))
    path = tmp_path_factory.mktemp("damage") / "net.fish"
    codec.compress(net, path)
    return net, path.read_bytes(), path.with_name("changed.fish")


def mutate(content, random):
    content = bytearray(content)
    kind = random.integers(5)
    place = int(random.integers(len(content)))
    if kind == 0:
        content[place] ^= 1 << int(random.integers(8))
    elif kind == 1:
        content[place] = (content[place] + int(random.integers(1, 256))) % 256
    elif kind == 2:
        del content[place : place + int(random.integers(1, 40))]
    elif kind == 3:
        content[place:place] = random.bytes(int(random.integers(1, 40)))
    else:
        length = int(random.integers(2, 20))
        content[place : place + length] = random.bytes(length)
    return bytes(content)


def test_a_thousand_damaged_files_give_errors_and_never_weights(stored):
    net, content, path = stored
    random = np.random.default_rng(0)
    damaged = [content[:n] for n in range(0, len(content), 7)]
    damaged += [changed for _ in range(1200) if (changed := mutate(content, random)) != content]
    assert len(damaged) > 1200
    for changed in damaged:
        path.write_bytes(changed)
        for read in (lambda: codec.load(path, net), lambda: codec.size(path)):
            with pytest.raises(CompressedFileError):
                read()


def test_a_thousand_forged_files_with_right_checksums_give_errors_or_the_stored_weights(stored):
    net, content, path = stored
    random = np.random.default_rng(1)
    refused = 0
    for _ in range(1200):
        body = mutate(content[13:], random)
        path.write_bytes(content[:5] + codec._digest(body) + body)
        try:
            loaded = codec.load(path, net)
        except CompressedFileError:
            refused += 1
        else:
            assert identical(loaded, net)
    assert refused > 1000


@settings(max_examples=300, deadline=None)
@given(noise=st.binary(max_size=200))
def test_forged_tables_give_errors(stored, noise):
    net, content, path = stored
    body = content[13:21] + noise
    path.write_bytes(content[:5] + codec._digest(body) + body)
    with pytest.raises(CompressedFileError):
        codec.load(path, net)


def test_a_file_of_another_kind_version_or_network_says_so(stored):
    net, content, path = stored
    for changed, words in ((b"", "does not begin"), (b"PK\3\4" + content[4:], "does not begin"),
                           (content[:4] + b"\7" + content[5:], "format 07"), (content[:-1], "checksum"),
                           (content[:4], "format")):
        path.write_bytes(changed)
        with pytest.raises(CompressedFileError, match=words):
            codec.load(path, net)
    path.write_bytes(content)
    with pytest.raises(CompressedFileError, match="another network"):
        codec.load(path, nets.mlp((1, 8, 8), 10, (12, 9)))
    with pytest.raises(FileNotFoundError):
        codec.load(path.with_name("none.fish"), net)


def test_decoding_to_other_weights_is_noticed(stored):
    net, content, path = stored
    body = bytearray(content[13:])
    body[4] ^= 1  # the checksum of the decoded tensors
    path.write_bytes(content[:5] + codec._digest(bytes(body)) + bytes(body))
    with pytest.raises(CompressedFileError, match="other weights"):
        codec.load(path, net)


def test_a_failed_write_leaves_the_old_file(stored, monkeypatch):
    net, content, path = stored
    path.write_bytes(content)
    monkeypatch.setattr(codec.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        codec.compress(net, path)
    assert path.read_bytes() == content
    assert sorted(p.name for p in path.parent.iterdir()) == ["changed.fish", "net.fish"]


def test_clusters_may_be_weighted_by_adams_second_moment(net, data):
    weighed, _ = fit(net, data, epochs=3, callbacks=[codec.SharedWeights(2, importance="fisher")])
    alike, _ = fit(net, data, epochs=3, callbacks=[codec.SharedWeights(2)])
    assert all(len(w[w != 0].unique()) <= 4 for w in weights.values(weighed).values())
    assert not torch.equal(weights.values(weighed)["1.weight"], weights.values(alike)["1.weight"])


def test_an_interrupted_compression_goes_on_to_the_same_network(net, data, tmp_path):
    class Stop(codec.L.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 3:
                raise RuntimeError("power failure")

    def callbacks():
        return [weights.Pruning(0.8, end=0.5), codec.SharedWeights(3, start=0.6)]

    whole, _ = fit(net, data, epochs=4, callbacks=callbacks())
    with pytest.raises(RuntimeError, match="power"):
        fit(net, data, epochs=4, callbacks=[*callbacks(), Stop()], checkpoint=tmp_path / "run.ckpt")
    resumed, _ = fit(net, data, epochs=4, callbacks=callbacks(), checkpoint=tmp_path / "run.ckpt")
    assert identical(weights.plain(resumed), weights.plain(whole))


def test_the_ratio_does_not_count_what_pruning_and_sharing_attach(data, net, tmp_path):
    held, _ = fit(net, data, epochs=1, callbacks=[weights.Pruning(0.8, end=0.3), codec.SharedWeights(3, start=0.6)])
    codec.compress(held, tmp_path / "file")
    assert codec.ratio(tmp_path / "file", held) == codec.ratio(tmp_path / "file", weights.plain(held))


def test_sixteen_bits_of_shared_values_keep_every_weight():
    weight = torch.linspace(-1, 1, 40_000).view(200, 200)
    shared = codec.Shared(weight)
    shared.assign(weight, 2**16)
    assert torch.allclose(shared(weight), weight, atol=1e-3)
