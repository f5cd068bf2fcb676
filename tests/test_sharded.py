"""The classifier over shared classes against one process that knows nothing of shares."""

import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F

from rayltr.hardest import Hardest
from rayltr.parallel import everyones, rank, returned, share, sizes_of, world
from rayltr.sharded import Shard

EXACT = {"rtol": 0, "atol": 1e-12}
DIM, BATCH, HARD, STEPS = 6, 12, 3, 3
SIZES = {1: [12], 2: [7, 5], 4: [3, 1, 4, 4]}
"""How the workers share a batch."""
CASES = {
    f"{classes} classes, {'cosine' if cosine else 'dot'}, alpha {alpha}{', logits kept' if kept else ''}": {
        "classes": classes, "cosine": cosine, "alpha": alpha, "kept": kept}
    for classes in (40, 37)
    for cosine in (True, False)
    for alpha in (0.0, 0.2)
    for kept in (False, True)
}  # fmt: skip
SAMPLED = {"cosine": {"classes": 37, "cosine": True}, "dot": {"classes": 40, "cosine": False}}


def numbers(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels_of(classes, seed):
    """A batch with duplicates and with the first and last class of every share of 2 and 4 workers."""
    borders = [
        place for w in (2, 4) for n in range(w) for place in (share(classes, n, w)[0], share(classes, n, w)[0] - 1)
    ]
    random = torch.randint(classes, (BATCH,), generator=torch.Generator().manual_seed(seed))
    random[: BATCH // 2] = torch.tensor(borders)[torch.randperm(len(borders))[: BATCH // 2]] % classes
    random[-2:] = random[0]
    return random


def hard_of(classes):
    """Some other classes for each class [classes, HARD]."""
    table = torch.stack([torch.randperm(classes - 1)[:HARD] for _ in range(classes)])
    return table + (table >= torch.arange(classes)[:, None])


def problem(classes):
    torch.manual_seed(0)
    hard = hard_of(classes)
    return {
        "weight": 0.5 * numbers(classes, DIM, seed=1),
        "features": [numbers(BATCH, DIM, seed=10 + step) for step in range(STEPS)],
        "labels": [labels_of(classes, 20 + step) for step in range(STEPS)],
        "hard": hard,
    }


def leader(lr):
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9, weight_decay=0.01)


def rates(step):
    return 0.5 / (1 + step)


def reference(classes, cosine, alpha, seen=None, temperature=0.15):
    """Losses, gradients of the features and rows after each step, by autograd and torch's SGD; `seen`: per step."""
    given = problem(classes)
    weight = given["weight"].clone().requires_grad_()
    optimiser = torch.optim.SGD([weight], lr=1.0, momentum=0.9, weight_decay=0.01)
    found = []
    for step in range(STEPS):
        x, labels = given["features"][step].clone().requires_grad_(), given["labels"][step]
        logits = (F.normalize(x) @ F.normalize(weight).T if cosine else x @ weight.T) / temperature
        if seen:
            hidden = torch.ones(classes, dtype=torch.bool)
            hidden[seen[step]] = False
            logits = logits.masked_fill(hidden, -torch.inf)
        target = torch.zeros(BATCH, classes, dtype=torch.float64)
        target[torch.arange(BATCH), labels] += 1 - alpha
        target.scatter_add_(1, given["hard"][labels], torch.full((BATCH, HARD), alpha / HARD, dtype=torch.float64))
        loss = (logits.logsumexp(1) - torch.where(target > 0, target * logits, 0.0).sum(1)).mean()
        optimiser.param_groups[0]["lr"] = rates(step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append((loss.detach(), x.grad, weight.detach().clone()))
    return found, optimiser.state[weight]["momentum_buffer"]


def trained(classes, cosine, alpha, kept=False, sampled=1.0):
    """The same by this worker's shard: losses, gradients of its own features, its rows; and what it saw."""
    given = problem(classes)
    torch.manual_seed(rank())
    shard = Shard(classes, DIM, cosine=cosine, block=7, kept=kept, sampled=sampled).double()
    first, many = share(classes, rank(), world())
    shard.weight.copy_(given["weight"][first : first + many])
    shard.hardest = lambda labels: given["hard"][labels]
    optimiser = leader(1.0)
    shard.obey(optimiser)
    start = sum(SIZES[world()][: rank()])
    own = slice(start, start + SIZES[world()][rank()])
    found, seen = [], []
    inner = shard._seen
    shard._seen = lambda goals: seen.append(inner(goals)) or seen[-1]
    for step in range(STEPS):
        x = given["features"][step][own].clone().requires_grad_()
        optimiser.param_groups[0]["lr"] = rates(step)
        loss = shard(x, given["labels"][step][own], alpha)
        loss.backward()
        found.append((loss.detach(), x.grad / world(), None if sampled < 1 else shard.weight.clone()))
    state = shard.state_dict()
    rows = [None if rows is None else rows + first for rows, _ in seen]
    return found, state["weight"].clone(), state["velocity"].clone(), rows


def exchanged():
    x = numbers(rank() + 1, 2, seed=rank())
    sizes = sizes_of(x)
    together = everyones(x, sizes)
    return sizes, together, returned(together * (rank() + 1), sizes)


def worker(number, workers, folder):
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", workers)
    distributed.init_process_group("gloo", store=store, rank=number, world_size=workers)
    torch.save(everything(), f"{folder}/{number}.pt")
    distributed.destroy_process_group()


def everything():
    rows = numbers(37, DIM, seed=3)
    first, many = share(37, rank(), world())
    hardest = Hardest(rows[first : first + many], 37, 5, block=4)
    torch.manual_seed(3)
    drawn = Shard(5000, 4).weight
    return {
        "drawn": drawn,
        "whole": {name: trained(**case) for name, case in CASES.items()},
        "sampled": {name: trained(**case, alpha=0.2, sampled=0.4) for name, case in SAMPLED.items()},
        "hardest": hardest(torch.tensor([36, 0, 18, 19, 0, 9, 10])),
        "exchanged": exchanged(),
    }


@pytest.fixture(scope="module", params=[1, 2, 4], ids="{} workers".format)
def workers(request, tmp_path_factory):
    if request.param == 1:
        return [everything()]
    folder = tmp_path_factory.mktemp("workers")
    torch.multiprocessing.spawn(worker, (request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"{number}.pt") for number in range(request.param)]


def compare(found, expected, velocity, alone=True):
    """What the workers found, against the one process."""
    for step, (loss, gradient, weight) in enumerate(expected):
        for one in found:
            torch.testing.assert_close(one[0][step][0], loss, **EXACT)
        torch.testing.assert_close(torch.cat([one[0][step][1] for one in found]), gradient, **EXACT)
        if alone:
            torch.testing.assert_close(torch.cat([one[0][step][2] for one in found]), weight, **EXACT)
    torch.testing.assert_close(torch.cat([one[1] for one in found]), expected[-1][2], **EXACT)
    torch.testing.assert_close(torch.cat([one[2] for one in found]), velocity, **EXACT)


@pytest.mark.parametrize("case", CASES)
def test_loss_gradients_and_rows_are_those_of_one_process(workers, case):
    keywords = {name: value for name, value in CASES[case].items() if name != "kept"}
    compare([one["whole"][case] for one in workers], *reference(**keywords))


@pytest.mark.parametrize("case", SAMPLED)
def test_a_sample_is_the_softmax_over_what_was_seen_and_the_rest_is_made_good(workers, case):
    """Rows that were not seen end where plain SGD takes them, by weight decay and momentum alone."""
    found = [one["sampled"][case] for one in workers]
    seen = [torch.cat([one[3][step] for one in found]) for step in range(STEPS)]
    given = problem(SAMPLED[case]["classes"])
    for step, rows in enumerate(seen):
        assert len(rows.unique()) == len(rows) < SAMPLED[case]["classes"]
        labels = given["labels"][step]
        assert {*labels.tolist(), *given["hard"][labels].flatten().tolist()} <= set(rows.tolist())
    compare(found, *reference(**SAMPLED[case], alpha=0.2, seen=seen), alone=False)


def test_the_hardest_are_the_nearest_others(workers):
    rows = F.normalize(numbers(37, DIM, seed=3))
    labels = torch.tensor([36, 0, 18, 19, 0, 9, 10])
    expected = (rows @ rows.T).fill_diagonal_(-torch.inf)[labels].topk(5).indices
    for one in workers:
        assert torch.equal(one["hardest"], expected)


def test_first_rows_do_not_depend_on_the_number_of_workers(workers):
    torch.manual_seed(3)
    whole = Shard(5000, 4).weight
    assert torch.equal(torch.cat([one["drawn"] for one in workers]), whole)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(5000))
    assert len(whole.unique(dim=0)) == 5000


def test_rows_that_are_exchanged_come_back_summed(workers):
    many = len(workers)
    whole = torch.cat([numbers(number + 1, 2, seed=number) for number in range(many)])
    begin = 0
    for number, one in enumerate(workers):
        sizes, together, back = one["exchanged"]
        assert sizes == [each + 1 for each in range(many)]
        assert torch.equal(together, whole)
        torch.testing.assert_close(back, whole[begin : begin + number + 1] * sum(range(1, many + 1)))
        begin += number + 1


@pytest.mark.parametrize(("rows", "workers"), [(7, 1), (8, 4), (7, 4), (2, 3), (0, 2)])
def test_shares_are_neighbours_and_even(rows, workers):
    parts = [range(first, first + many) for first, many in (share(rows, n, workers) for n in range(workers))]
    assert [place for part in parts for place in part] == list(range(rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def alone(**keywords):
    torch.manual_seed(0)
    shard = Shard(200, DIM, **keywords)
    optimiser = leader(0.3)
    shard.obey(optimiser)
    return shard, optimiser


@pytest.mark.parametrize("pattern", ["often", "rarely", "all at the end"])
def test_catching_up_is_the_dense_optimiser_whatever_was_skipped(pattern):
    """Forty steps at changing learning rates; the dense one gives every row that is not seen a gradient of zero."""
    classes, steps = 30, 40
    shard = Shard(classes, DIM, sampled=0.5).double()
    optimiser = leader(1.0)
    shard.obey(optimiser, rate=2.0)
    dense = shard.weight.clone().requires_grad_()
    other = torch.optim.SGD([dense], lr=1.0, momentum=0.9, weight_decay=0.01)
    chance = {"often": 0.5, "rarely": 0.05, "all at the end": 0.0}[pattern]
    for step in range(steps):
        seen = torch.rand(classes, generator=torch.Generator().manual_seed(step)) < chance
        rows = (seen | (step == steps - 1)).nonzero().squeeze(1)
        shard._seen = lambda goals, rows=rows: (shard.catch_up(rows), (rows, torch.full_like(goals, -1)))[1]
        lr = optimiser.param_groups[0]["lr"] = 0.5 * (1 + (step * 7) % 5)
        x = numbers(4, DIM, seed=step)
        shard(x.requires_grad_(), torch.zeros(4, dtype=torch.int64)).backward()
        other.param_groups[0]["lr"] = 2 * lr
        other.zero_grad()
        logits = F.normalize(x.detach()) @ F.normalize(dense[rows]).T / 0.15
        (logits.logsumexp(1).mean() if len(rows) else 0 * dense.sum()).backward()
        other.step()
    shard.catch_up()
    torch.testing.assert_close(shard.weight, dense.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(shard.velocity, other.state[dense]["momentum_buffer"], rtol=1e-12, atol=1e-12)


def test_a_state_holds_rows_that_are_up_to_date_and_taking_it_changes_nothing():
    found = []
    for looks in (False, True):
        shard, _ = alone(sampled=0.2)
        torch.manual_seed(1)
        for step in range(4):
            x = numbers(8, DIM, seed=step).float()
            shard(x.requires_grad_(), torch.arange(8) + 8 * step).backward()
            if looks and step == 3:
                shard.state_dict()
        assert set(shard.state_dict()) == {"weight", "velocity"} and not shard.last.any()
        found.append(shard.state_dict()["weight"].clone())
    assert torch.equal(*found)


@pytest.mark.parametrize("sampled", [1.0, 0.3])
def test_blocks_and_kept_logits_change_nothing_but_the_memory(sampled):
    found = []
    for keywords in ({"block": 8192}, {"block": 64}, {"block": 17, "kept": True}):
        shard, _ = alone(sampled=sampled, **keywords)
        shard = shard.double()
        torch.manual_seed(1)
        losses = [shard(numbers(8, DIM, seed=s).requires_grad_(), torch.arange(8)) for s in range(3)]
        for loss in losses[2:]:
            loss.backward()
        found.append(torch.cat([shard.state_dict()["weight"].flatten(), torch.stack(losses).detach()]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-12)


def test_bfloat16_products_are_near_and_sums_are_wide():
    """Sixty thousand equal classes: a sum in bfloat16 would stop at 256."""
    losses = {}
    for bf16 in (False, True):
        torch.manual_seed(0)
        shard = Shard(60_000, DIM, bf16=bf16)
        shard.weight[:] = shard.weight[0]
        loss = shard(numbers(4, DIM, seed=0).float(), torch.arange(4))
        losses[bf16] = loss.item()
        assert loss.dtype == torch.float32
    assert losses[True] == pytest.approx(torch.tensor(60_000.0).log().item(), abs=0.03)
    assert losses[False] == pytest.approx(torch.tensor(60_000.0).log().item(), abs=1e-3)


def test_a_far_class_costs_what_it_is_far():
    """No probability is clamped: a loss of 400 is one of 400."""
    shard = Shard(3, 2, cosine=False, temperature=1.0)
    shard.weight.copy_(torch.tensor([[0.0, 0.0], [400.0, 0.0], [0.0, 0.0]]))
    assert shard(torch.tensor([[1.0, 0.0]]), torch.tensor([0])).item() == pytest.approx(400.0)


def test_rows_stay_until_they_are_told_to_move():
    shard = Shard(50, DIM)
    before, x = shard.weight.clone(), torch.randn(4, DIM, requires_grad=True)
    shard(x, torch.arange(4)).backward()
    assert torch.equal(shard.weight, before) and x.grad.abs().sum() > 0


def test_half_precision_features_are_compared_in_float32():
    shard = Shard(50, DIM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert shard(torch.randn(4, DIM).bfloat16(), torch.arange(4)).dtype == torch.float32


@pytest.mark.parametrize("keywords", [{"temperature": 0.0}, {"sampled": 0.0}, {"norm": 0.0}, {"block": 0}])
def test_values_outside_are_refused(keywords):
    with pytest.raises(ValueError, match="a sharded classifier needs"):
        Shard(5, DIM, **keywords)


@pytest.mark.parametrize("optimiser", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, nesterov=True, momentum=0.9)])
def test_other_optimisers_are_refused(optimiser):
    with pytest.raises(ValueError, match="sgd without nesterov"):
        Shard(5, DIM).obey(optimiser([nn.Parameter(torch.zeros(1))]))
