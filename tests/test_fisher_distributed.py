"""Two processes that share the images give the numbers of one."""

import torch
import torch.multiprocessing as mp
from torch import nn

from fishlib import fisher


def problem():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)).double()
    return net, torch.randn(7, 1, 5, 5, dtype=torch.float64), torch.randint(4, (7,))


def measured(net, batches):
    d = {name: p.detach() for name, p in net.named_parameters()}
    trace = fisher.trace(net, batches)
    return {"diagonal": fisher.diagonal(net, batches), "product": fisher.vector_product(net, batches, d),
            "empirical": fisher.diagonal(net, batches, "empirical"),
            "kfac": fisher.natural_gradient(net, batches, d, 0.1, "kfac"), "cg": fisher.natural_gradient(net, batches, d, 0.1),
            "numbers": {"quadratic": torch.tensor(fisher.quadratic(net, batches, d)), "trace": torch.tensor(trace.value),
                        "error": torch.tensor(trace.standard_error),
                        "kl": torch.tensor(fisher.kl(net, nn.Sequential(net, nn.Softsign()), batches))}}


def share(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    net, images, labels = problem()
    uneven = [[(images[:2], labels[:2])], [(images[2:5], labels[2:5]), (images[5:], labels[5:])]]
    empty = [[(images, labels)], []]
    torch.save([measured(net, parts[rank]) for parts in (uneven, empty)], f"{folder}/{rank}.pt")
    estimate = fisher.trace_estimate(net, uneven[rank], generator=torch.Generator().manual_seed(rank))
    torch.save(torch.tensor([estimate.value, estimate.standard_error]), f"{folder}/estimate-{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_numbers_of_one_also_when_one_has_no_images(tmp_path):
    mp.spawn(share, (str(tmp_path),), nprocs=2)
    net, images, labels = problem()
    expected = measured(net, (images, labels))
    for rank in range(2):
        for found in torch.load(tmp_path / f"{rank}.pt"):
            for what, values in expected.items():
                for name, value in values.items():
                    assert torch.allclose(found[what][name], value, rtol=1e-6), (what, name)
        draws, n = torch.Generator().manual_seed(0), torch.tensor([2, 3, 2], dtype=torch.float64)
        values = [fisher.trace_estimate(net, images[:2], generator=draws).value]
        draws.manual_seed(1)
        values += [fisher.trace_estimate(net, part, generator=draws).value for part in (images[2:5], images[5:])]
        values = torch.tensor(values, dtype=torch.float64)
        mean = (n * values).sum() / 7
        error = ((n * (values - mean)).square().sum() / 49 * 3 / 2).sqrt()
        assert torch.allclose(torch.load(tmp_path / f"estimate-{rank}.pt").double(), torch.stack([mean, error]))
