import copy

import pytest
import pytorch_lightning as L
import torch
from torch import nn
from torch.nn import functional as F

from fishlib import nets
from fishlib.data import ImageData
from fishlib.natural_gradient import NaturalGradient
from fishlib.penalty import FisherTrace
from fishlib.training import evaluate, fit
from fishlib.weights import Pruning


class Stop(Exception):
    pass


class StopAt(L.Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, module):
        if module.current_epoch == self.epoch:
            raise Stop


@pytest.fixture(scope="module")
def small():
    return ImageData("digits", batch_size=32, limit=400, device="cpu")


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 10))


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def test_training_learns_and_the_history_is_tidy(small, net):
    trained, history = fit(net, small, epochs=6, lr=1e-2, precision="float32")
    assert history["epoch"].tolist() == [1, 2, 3, 4, 5, 6]
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]
    assert history["validation_accuracy"].iloc[-1] == pytest.approx(evaluate(trained, small).accuracy)
    assert history["validation_loss"].iloc[-1] == pytest.approx(evaluate(trained, small).loss, rel=1e-5)
    assert history.notna().all().all()


def test_the_given_network_and_the_random_state_stay_as_they_were(small, net):
    before, state = copy.deepcopy(net), torch.get_rng_state()
    fit(net, small, epochs=1)
    assert same(net, before)
    assert net.training
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_a_network_in_evaluation_mode_is_trained_in_training_mode(small, net):
    expected, _ = fit(net, small, epochs=1)
    resting = copy.deepcopy(net).eval()
    assert same(fit(resting, small, epochs=1)[0], expected)
    assert not resting.training


def test_the_random_state_and_the_network_stay_also_after_an_exception(small, net):
    before, state = copy.deepcopy(net), torch.get_rng_state()
    with pytest.raises(Stop):
        fit(net, small, epochs=3, callbacks=[StopAt(1)])
    assert same(net, before)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_the_same_seed_gives_the_same_weights_to_the_last_bit(small, net, optimizer):
    runs = [fit(net, small, epochs=2, optimizer=optimizer, lr=0.01, seed=seed)[0] for seed in (3, 3, 4)]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_an_interrupted_run_goes_on_to_the_same_result(small, net, tmp_path):
    whole, history = fit(net, small, epochs=5)
    file = tmp_path / "with space ü" / "run.ckpt"
    with pytest.raises(Stop):
        fit(net, small, epochs=5, checkpoint=file, callbacks=[StopAt(3)])
    resumed, again = fit(net, small, epochs=5, checkpoint=file)
    assert same(whole, resumed)
    assert history.drop(columns="seconds").equals(again.drop(columns="seconds"))
    assert [path.name for path in file.parent.iterdir()] == ["run.ckpt"]


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(small, net, tmp_path):
    file = tmp_path / "run.ckpt"
    fit(net, small, epochs=1, checkpoint=file)
    with pytest.raises(ValueError, match=r"other settings \(epochs 1 there, 2 here\)"):
        fit(net, small, epochs=2, checkpoint=file)
    file.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        fit(net, small, epochs=1, checkpoint=file)


@pytest.mark.parametrize(("changed", "message"), [
    ({"seed": 1}, "split 0 there, 1 here"), ({"limit": 300}, "images 360 there, 270 here"),
    ({"augment": ("cutout",)}, r"augment \[\] there, \['cutout'\] here")])
def test_a_checkpoint_of_other_training_images_is_refused(small, net, tmp_path, changed, message):
    fit(net, small, epochs=1, checkpoint=tmp_path / "run")
    other = ImageData("digits", **{"batch_size": 32, "limit": 400, "device": "cpu"} | changed)
    with pytest.raises(ValueError, match=rf"other settings \({message}\)"):
        fit(net, other, epochs=1, checkpoint=tmp_path / "run")


@pytest.mark.parametrize("width", [12, 20])
def test_a_checkpoint_of_another_network_is_refused(small, tmp_path, width):
    torch.manual_seed(0)
    first, second = nets.mlp(small.shape, 10, (12,)), nets.mlp(small.shape, 10, (width,))
    fit(first, small, epochs=1, checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match=r"other settings \(network [0-9a-f]{16} there, [0-9a-f]{16} here\)"):
        fit(second, small, epochs=1, checkpoint=tmp_path / "run")


def test_fit_takes_the_same_steps_as_a_plain_loop(small):
    torch.manual_seed(0)
    net = nets.mlp(small.shape, 10, (12,))
    ours, _ = fit(net, small, epochs=2, optimizer="sgd", lr=0.05, schedule="constant", precision="float32")
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, nesterov=True)
    batches = small.batches("train")
    for _ in range(2):
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
    assert same(net, ours)


@pytest.mark.parametrize("schedule", ["onecycle", "step", "constant"])
def test_schedules_end_where_they_should(small, net, schedule):
    _, history = fit(net, small, epochs=4, optimizer="sgd", lr=0.1, schedule=schedule)
    last = history["lr"].iloc[-1]
    assert last == pytest.approx({"onecycle": 0.0, "step": 0.001, "constant": 0.1}[schedule], abs=1e-3)


def test_a_penalty_is_added_to_the_loss(small, net):
    weights = [fit(net, small, epochs=2, penalty=penalty)[0][1].weight.norm() for penalty in (
        None, lambda net, images, labels, logits: 0.1 * sum(p.square().sum() for p in net.parameters()))]
    assert weights[1] < weights[0]


def test_an_optimizer_can_be_made_from_the_network(small, net):
    trained, history = fit(net, small, epochs=1, optimizer=lambda net: torch.optim.RMSprop(net.parameters(), 1e-3))
    assert not same(net, trained)
    assert history["lr"].iloc[0] > 0


def test_a_loss_that_is_no_longer_finite_stops_the_run_with_advice(small, net):
    with pytest.raises(FloatingPointError, match=r"in epoch 1: lower the learning rate \(1e\+30\)"):
        fit(nets.mlp(small.shape, 10, (12,)), small, epochs=2, optimizer="sgd", lr=1e30, schedule="constant")


@pytest.mark.parametrize("options", [{"epochs": 0}, {"optimizer": "adm"}, {"schedule": "cosine"}, {"precision": "fp8"}])
def test_unknown_options_are_refused_with_the_choices(small, net, options):
    with pytest.raises(ValueError, match="use"):
        fit(net, small, **options)


@pytest.mark.parametrize(("wrong", "told"), [
    (nn.Linear(64, 5), "the network has 5 outputs, digits has 10 classes"),
    (nn.Unflatten(1, (8, 8)), r"gives numbers of shape \(32, 8, 8\), it has to give logits of shape \(images, 10\)"),
    (nn.Linear(64, 10).double(), r"the network is float64: call \.float\(\)"),
    (nn.Conv1d(1, 1, 1, dtype=torch.float64), r"the network is float64: call \.float\(\)"),
    (nn.Linear(64, 10).requires_grad_(False), r"all parameters of the network are frozen: call net\.requires_grad_\(True\)")],
    ids=["few outputs", "no logits", "float64", "float64 kernels", "frozen"])
def test_a_network_that_cannot_be_trained_is_refused_before_a_step_and_stays_as_it_was(small, wrong, told):
    shape = nn.Unflatten(1, (1, 64)) if isinstance(wrong, nn.Conv1d) else nn.Linear(64, 64) if isinstance(
        wrong, nn.Unflatten) else nn.Identity()
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64, affine=False, dtype=torch.float32), shape, wrong)
    before, state = copy.deepcopy(net), torch.get_rng_state()
    with pytest.raises(ValueError, match=told):
        fit(net, small, epochs=1)
    assert same(net, before)
    assert torch.equal(state, torch.get_rng_state())


def test_a_network_with_too_few_outputs_is_not_evaluated_either(small):
    with pytest.raises(ValueError, match="the network has 5 outputs, digits has 10 classes"):
        evaluate(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), small)


def test_networks_with_more_outputs_than_classes_or_that_convert_their_images_are_trained(small):
    class Precise(nn.Sequential):
        def forward(self, images):
            return super().forward(images.double()).float()

    for net in (nn.Sequential(nn.Flatten(), nn.Linear(64, 12)), Precise(nn.Flatten(), nn.Linear(64, 10).double())):
        _, history = fit(net, small, epochs=1, precision="float32")
        assert history.notna().all().all()


def test_a_frozen_network_that_a_callback_thaws_is_trained(small, net):
    class Thaw(L.Callback):
        def on_train_start(self, trainer, module):
            module.net.requires_grad_(True)

    frozen = copy.deepcopy(net).requires_grad_(False)
    assert same(fit(frozen, small, epochs=1, callbacks=[Thaw()])[0], fit(net, small, epochs=1)[0])


@pytest.mark.parametrize("wrong", ["fisher_trace", FisherTrace, 0.01])
def test_what_is_no_penalty_is_refused_with_what_is(small, net, wrong):
    with pytest.raises(ValueError, match=r"is not a penalty: use an object, .*penalty.named\("):
        fit(net, small, epochs=1, penalty=wrong)


def test_bfloat16_and_channels_last_train_a_convolutional_network(small):
    torch.manual_seed(0)
    trained, history = fit(nets.small_cnn(10, small.shape, 4), small, epochs=1, precision="bfloat16")
    assert next(trained.parameters()).dtype == torch.float32
    assert history.notna().all().all()


def test_bfloat16_trains_networks_with_3d_kernels_too(small):
    trained, history = fit(nets.relation_net("triplanar", 10, small.shape, 8, 4), small, epochs=1, precision="bfloat16")
    assert trained[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert history.notna().all().all()


def test_evaluate_restores_modes_and_states_the_standard_error(small, net):
    net[3].eval()
    result = evaluate(net, small, "test")
    assert net.training
    assert not net[3].training
    assert result.samples == small.size("test")
    assert result.standard_error == pytest.approx((result.accuracy * (1 - result.accuracy) / result.samples) ** 0.5)


def test_evaluate_agrees_with_one_pass_over_the_split(small, net):
    images, labels = small.split("test")
    with torch.no_grad():
        logits = copy.deepcopy(net).eval()(images)
    result = evaluate(net, small, "test", batch_size=37)
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert result.accuracy == pytest.approx((logits.argmax(1) == labels).double().mean().item())


def test_training_prints_nothing(small, net, capfd, recwarn):
    fit(net, small, epochs=1)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
    assert not recwarn.list


def test_a_checkpoint_of_another_optimizer_is_refused(small, net, tmp_path):
    fit(net, small, epochs=1, optimizer=lambda one: torch.optim.SGD(one.parameters(), 0.1), checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match="momentum"):
        fit(net, small, epochs=1, optimizer=lambda one: torch.optim.SGD(one.parameters(), 0.1, momentum=0.9),
            checkpoint=tmp_path / "run")


def test_a_checkpoint_of_other_callbacks_of_the_library_or_of_another_precision_is_refused(small, net, tmp_path):
    fit(net, small, epochs=1, checkpoint=tmp_path / "run", callbacks=[Pruning(0.5)])
    with pytest.raises(ValueError, match=r"callbacks .*Pruning .*0\.5.* there"):
        fit(net, small, epochs=1, checkpoint=tmp_path / "run", callbacks=[Pruning(0.9)])
    with pytest.raises(ValueError, match="callbacks"):
        fit(net, small, epochs=1, checkpoint=tmp_path / "run")
    fit(net, small, epochs=1, checkpoint=tmp_path / "exact", precision="float32")
    with pytest.raises(ValueError, match="precision float32 there, bfloat16 here"):
        fit(net, small, epochs=1, checkpoint=tmp_path / "exact", precision="bfloat16")


def test_each_parameter_group_of_a_given_optimizer_rises_to_its_own_rate(small, net):
    def optimizer(one):
        first, *others = one.parameters()
        return torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": others, "lr": 0.001}])

    seen = Rates()
    fit(net, small, epochs=2, optimizer=optimizer, callbacks=[seen])
    assert max(one for one, _ in seen.rates) == pytest.approx(0.1, rel=0.05)
    assert max(other for _, other in seen.rates) == pytest.approx(0.001, rel=0.05)


class Rates(L.Callback):
    """The learning rates of the parameter groups, step by step."""

    def __init__(self):
        self.rates = []

    def on_train_batch_end(self, trainer, module, *_):
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


@pytest.mark.parametrize(("given", "message"), [
    ({"weight_decay": 0.9}, "weight_decay=0.9"), ({"lr": 5.0, "schedule": "constant"}, "lr=5")])
def test_what_a_function_for_the_optimizer_would_not_take_is_refused(small, net, given, message):
    with pytest.raises(ValueError, match=message):
        fit(net, small, epochs=1, optimizer=lambda one: torch.optim.SGD(one.parameters(), 0.1), **given)


def test_a_checkpoint_for_an_optimizer_that_keeps_its_state_elsewhere_is_refused(small, net, tmp_path):
    with pytest.raises(ValueError, match="NaturalGradient does not keep"):
        fit(net, small, epochs=1, optimizer=NaturalGradient, checkpoint=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
