import copy

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch.nn.functional import linear, silu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robopolicy.errors import UserError
from robopolicy.nets.context import Context, ContextSize
from robopolicy.nets.experts import ModeDenoiser, NoiseRouter, RoutedNoise, Routes, StackedExperts, draw_gumbel
from robopolicy.nets.transformer import LinearNoiseEmbedding

DIM, LAYERS, HORIZON, ACTION = 32, 3, 6, 2
LEVELS = 250 * torch.logspace(1.9, -3, 10).log()


def network(experts=4, top_k=2, hidden=40, **options):
    """A small network whose router has an opinion, so that levels and layers differ in their experts."""
    torch.manual_seed(0)
    net = ModeDenoiser(
        ACTION,
        HORIZON,
        ContextSize(n_obs_steps=2, step=5, goal=3),
        dim=DIM,
        layers=LAYERS,
        heads=4,
        noise_embedding=LinearNoiseEmbedding(DIM),
        experts=experts,
        top_k=top_k,
        hidden=hidden,
        **options,
    )
    net.router.hidden.weight.data.mul_(20)
    net.router.out.data.mul_(20)
    return net


def context(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Context(
        torch.randn(rows, 2, 5, generator=generator), goal=torch.randn(rows, 3, generator=generator), task=None
    )


def chosen_experts(net):
    return {tuple(expert for expert, _ in choice) for noise in net.at_levels(LEVELS) for choice in noise.routes}


def router_calls(net):
    calls = []
    net.router.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"shared_expert": True}, {"shared_expert": True, "top_k": 3}])
@pytest.mark.parametrize("rows", [1, 8, 64])
def test_tabulated_choices_are_the_router_s(rows, options):
    net = network(**options).eval()
    x, cond = torch.randn(rows, HORIZON, ACTION), net.condition(context(rows))
    table = net.at_levels(LEVELS)
    assert len(chosen_experts(net)) > 1
    with torch.no_grad():
        for level, noise in zip(LEVELS, table, strict=True):
            tabulated = net(x, noise, cond)
            routed = net(x, net.embed(level[None]), cond)
            row_by_row = net(x, net.embed(level.expand(rows)), cond)
            assert (tabulated - routed).abs().max() <= 1e-6
            assert (tabulated - row_by_row).abs().max() <= 1e-6


class Allocations(TorchDispatchMode):
    """Collects the sizes, in numbers, of the results that do not lie in a parameter's memory, and operators' inputs."""

    def __init__(self, net):
        super().__init__()
        self.parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
        self.new, self.read = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.read += [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.parameters:
                self.new.append(t.untyped_storage().nbytes() // t.element_size())
        return result


def test_tabulated_choices_use_the_weights_where_they_lie():
    net = network(hidden=256).eval()
    x, cond = torch.randn(1, HORIZON, ACTION), net.condition(context(1))
    noise = net.at_levels(LEVELS)[4]
    one_matrix = net.blocks[0].feed_forward.down[0].numel()
    with torch.no_grad():
        with Allocations(net) as tabulated:
            net(x, noise, cond)
        with Allocations(net) as routed:
            net(x, net.embed(LEVELS[4:5]), cond)
    assert max(tabulated.new) < one_matrix <= max(routed.new)
    read = {t.data_ptr() for t in tabulated.read}
    for block, choice in zip(net.blocks, noise.routes, strict=True):
        for weight in (block.feed_forward.up, block.feed_forward.down):
            used = {e for e in range(4) if weight[e].data_ptr() in read}
            assert used - {0} == {expert for expert, _ in choice} - {0}  # 0 begins where the whole stack does


def test_table_is_made_once_for_a_schedule_and_again_for_new_weights():
    net = network().eval()
    calls = router_calls(net)
    first = net.at_levels(LEVELS)
    again = net.at_levels(LEVELS)
    assert len(calls) == 1 and [n.routes for n in first] == [n.routes for n in again]
    net.at_levels(LEVELS[:4])
    assert len(calls) == 2
    net.at_levels(LEVELS)
    with torch.no_grad():
        net.router.hidden.weight.neg_()
    changed = net.at_levels(LEVELS)
    assert len(calls) == 4 and [n.routes for n in first] != [n.routes for n in changed]
    with torch.no_grad():
        net.noise_embedding.linear.bias.add_(3)
    net.at_levels(LEVELS)
    assert len(calls) == 5


def test_table_follows_averaged_weights():
    """They are written through `parameter.data`, which leaves the version of a tensor as it is."""
    net = network().eval()
    ema = EMAModel(net.parameters(), decay=0.0, foreach=True)
    averaged = copy.deepcopy(net)
    for _ in range(2):
        with torch.no_grad():
            for p in net.router.parameters():
                p.add_(torch.randn_like(p))
        ema.step(net.parameters())
        before = averaged.at_levels(LEVELS)
        ema.copy_to(averaged.parameters())
        after = averaged.at_levels(LEVELS)
        assert [n.routes for n in before] != [n.routes for n in after]
        assert [n.routes for n in after] == [n.routes for n in net.at_levels(LEVELS)]


def test_table_made_without_gradients_serves_with_gradients():
    net = network()
    with torch.inference_mode():
        net.at_levels(LEVELS)
    noise = net.at_levels(LEVELS)[0]
    net(torch.randn(2, HORIZON, ACTION), noise, net.condition(context(2))).sum().backward()
    assert net.noise_embedding.linear.weight.grad.abs().sum() > 0


def test_rows_go_through_their_own_experts():
    torch.manual_seed(0)
    layer = StackedExperts(8, 12, 4).double()
    layer.up_bias.data.normal_()
    tokens = torch.randn(7, 5, 8, dtype=torch.double, requires_grad=True)
    index = torch.tensor([[0, 1], [1, 0], [3, 1], [0, 3], [1, 3], [0, 1], [3, 0]])  # nobody takes expert 2
    weight = torch.rand(7, 2, dtype=torch.double, requires_grad=True)
    (route,) = Routes(torch.zeros(7, 1, 4), index[:, None], weight[:, None]).by_layer()

    def expected():
        rows = []
        for row in range(7):
            mixed = 0
            for slot in range(2):
                e = index[row, slot]
                value, gate = linear(tokens[row], layer.up[e], layer.up_bias[e]).chunk(2, dim=-1)
                mixed = mixed + weight[row, slot] * linear(value * silu(gate), layer.down[e])
            rows.append(mixed)
        return torch.stack(rows)

    wanted = [tokens, weight, *layer.parameters()]
    torch.testing.assert_close(layer(tokens, route), expected())
    ours = torch.autograd.grad(layer(tokens, route).square().sum(), wanted)
    theirs = torch.autograd.grad(expected().square().sum(), wanted)
    torch.testing.assert_close(ours, theirs)


def test_router_s_probabilities_and_weights_sum_to_one():
    net = network()
    routes = net.route(net.embed(LEVELS), ())
    assert routes.probabilities.shape == (10, LAYERS, 4)
    torch.testing.assert_close(routes.probabilities.sum(-1), torch.ones(10, LAYERS))
    torch.testing.assert_close(routes.weight.sum(-1), torch.ones(10, LAYERS))
    most, index = routes.probabilities.topk(2)
    assert torch.equal(routes.index, index)
    torch.testing.assert_close(routes.weight, most / most.sum(-1, keepdim=True))
    assert routes.probabilities.std(0).min() > 0  # the noise level decides


def test_shared_expert_is_always_taken():
    net = network(top_k=3, shared_expert=True)
    for noise in net.at_levels(LEVELS):
        for choice in noise.routes:
            (shared, one), *others = choice
            assert (shared, one) == (0, 1.0) and len(others) == 2
            assert all(1 <= expert <= 3 for expert, _ in others)
            assert sum(weight for _, weight in others) == pytest.approx(1, abs=1e-6)


def test_experts_are_sampled_without_replacement():
    """Pairs come as often as Plackett and Luce say: p_i p_j / (1 - p_i), the first drawn first."""
    torch.manual_seed(0)
    router = NoiseRouter(8, 1, 4, top_k=2)
    router.out_bias.data = torch.tensor([[1.0, 0.5, 0.0, -1.0]])
    n = 40_000
    gumbel = draw_gumbel(n, router, torch.Generator().manual_seed(1))
    routes = router(torch.randn(1, 8).expand(n, 8), gumbel)
    p = routes.probabilities[0, 0]
    counts = torch.zeros(4, 4).index_put_(tuple(routes.index[:, 0].T), torch.ones(n), accumulate=True)
    expected = p[:, None] * p / (1 - p[:, None])
    expected.fill_diagonal_(0)
    assert ((counts / n - expected).abs() <= 4.5 * (expected * (1 - expected) / n).sqrt()).all()
    torch.testing.assert_close(routes.weight[:, 0], p[routes.index[:, 0]] / p[routes.index[:, 0]].sum(1, keepdim=True))


def test_load_balance_is_one_for_equal_use_and_e_for_one_expert():
    def balance(probabilities, index):
        return Routes(probabilities, index, torch.ones(index.shape)).load_balance().item()

    uniform = torch.full((8, 2, 4), 0.25)
    turns = torch.arange(8)[:, None, None].expand(8, 2, 1) % 4
    pairs = torch.cat([turns, (turns + 1) % 4], dim=2)
    assert balance(uniform, turns) == pytest.approx(1) and balance(uniform, pairs) == pytest.approx(1)
    one = torch.zeros(8, 2, 4).index_fill_(2, torch.tensor([3]), 1.0)
    assert balance(one, torch.full((8, 2, 1), 3)) == pytest.approx(4)


def test_load_balance_moves_probability_to_idle_experts():
    """Rows of different noise levels may still take different experts: only the batch's mean counts."""
    torch.manual_seed(0)
    router = NoiseRouter(8, 2, 4, top_k=1)
    router.out_bias.data = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]])
    router(torch.randn(64, 8)).load_balance().backward()
    assert router.out_bias.grad[0, 0] > 0 and router.out_bias.grad[1, 3] > 0
    assert (router.out_bias.grad[0, 1:] < 0).all() and (router.out_bias.grad[1, :3] < 0).all()
    probabilities = torch.eye(4)[torch.arange(16) % 4][:, None]
    assert Routes(probabilities, probabilities.argmax(-1, keepdim=True), torch.ones(16, 1, 1)).load_balance() == 1


@pytest.mark.parametrize("shared", [False, True])
def test_every_parameter_gets_a_gradient(shared):
    net = network(shared_expert=shared, top_k=3)  # of one chosen expert the renormalised weight is constant
    cond = net.condition(context(32))
    embedding = net.embed(LEVELS.repeat(4)[:32])
    gumbel = draw_gumbel(32, net.router, torch.Generator().manual_seed(0))
    noise = RoutedNoise(embedding, net.route(embedding, cond, gumbel).by_layer())
    net(torch.randn(32, HORIZON, ACTION), noise, cond).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_routing_depends_on_the_noise_level_alone():
    net = network()
    embedding = net.embed(LEVELS[:8])
    one, other = (net.route(embedding, net.condition(context(8, seed))) for seed in (0, 1))
    assert torch.equal(one.probabilities, other.probabilities)


def test_routing_on_goals_gives_rows_their_own_experts():
    net = network(route_on_goal=True).eval()
    net.asked.weight.data.mul_(5)
    x, cond = torch.randn(16, HORIZON, ACTION), net.condition(context(16))
    (noise,) = net.at_levels(LEVELS[3:4])
    assert len(set(map(tuple, net.route(noise, cond).index[:, 0].tolist()))) > 1
    with torch.no_grad():
        whole = net(x, noise, cond)
        alone = [net(x[i : i + 1], noise, tuple(c[i : i + 1] for c in cond)) for i in range(16)]
    torch.testing.assert_close(whole, torch.cat(alone), atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match="needs goals or instructions"):
        ModeDenoiser(
            ACTION,
            HORIZON,
            ContextSize(n_obs_steps=2, step=5),
            dim=DIM,
            layers=1,
            heads=4,
            noise_embedding=LinearNoiseEmbedding(DIM),
            experts=4,
            top_k=2,
            hidden=8,
            route_on_goal=True,
        )


def test_active_parameters_are_those_of_the_paper():
    """Width 1024, 8 layers, 4 experts, 2 of them active: 0.56 of 456 million (trunk without image encoders)."""
    with torch.device("meta"):
        net = ModeDenoiser(
            7,
            10,
            ContextSize(n_obs_steps=1, step=1024, goal=512),
            dim=1024,
            layers=8,
            heads=8,
            noise_embedding=LinearNoiseEmbedding(1024),
            experts=4,
            top_k=2,
            hidden=4096,
        )
    total = sum(p.numel() for p in net.parameters())
    assert total == pytest.approx(456e6, rel=0.01)
    assert net.active_parameters() == pytest.approx(254.6e6, rel=0.01)
    assert network(top_k=4).active_parameters() == sum(p.numel() for p in network().parameters())


def test_impossible_mixtures_are_refused():
    with pytest.raises(UserError, match=r"top_k=5 must lie in 1\.\.experts=4\."):
        network(top_k=5)
    with pytest.raises(UserError, match=r"top_k=1 must lie in 2\.\.experts=4 \(one is shared\)"):
        network(top_k=1, shared_expert=True)
    with pytest.raises(UserError, match="expert_hidden=0"):
        network(hidden=0)
