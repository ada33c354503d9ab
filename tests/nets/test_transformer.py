import pytest
import torch
from torch import nn

from robopolicy.diffusion.edm import EdmConfig, EdmProcess
from robopolicy.errors import UserError
from robopolicy.nets.context import Context, ContextSize
from robopolicy.nets.transformer import (
    GptBlock,
    GptDenoiser,
    LinearNoiseEmbedding,
    Mlp,
    SelfAttention,
    SinusoidalNoiseEmbedding,
    draw_dropout,
)

HORIZON, DIM, LAYERS = 6, 16, 2


def gpt(goal=3, task=2, **options):
    torch.manual_seed(0)
    net = GptDenoiser(
        action_dim=2,
        horizon=HORIZON,
        size=ContextSize(n_obs_steps=2, step=4, goal=goal, task=task),
        **{"dim": DIM, "layers": LAYERS, "heads": 4, **options},
        feed_forward=lambda: Mlp(DIM, 2 * DIM),
        noise_embedding=LinearNoiseEmbedding(DIM),
    )
    for p in net.parameters():  # a fresh GPT hardly mixes its tokens
        p.data.normal_(std=0.3)
    return net


def context(rows, goal=3, task=2):
    return Context(
        torch.randn(rows, 2, 4),
        torch.randn(rows, goal) if goal else None,
        torch.randn(rows, task) if task else None,
        torch.zeros(rows, dtype=torch.long) if task else None,
    )


def call(net, x, level, context):
    return net(x, net.embed(level), net.condition(context))


@pytest.mark.parametrize(("goal", "task"), [(0, 0), (3, 0), (0, 2), (3, 2)])
def test_parts_that_are_not_there_have_no_token(goal, task):
    net = gpt(goal, task)
    given = context(5, goal, task)
    (tokens,) = net.condition(given)
    assert tokens.shape == (5, 2 + bool(goal) + bool(task), DIM)
    assert call(net, torch.randn(5, HORIZON, 2), torch.arange(5), given).shape == (5, HORIZON, 2)


@pytest.mark.parametrize("noise_conditioned", [False, True])
def test_every_parameter_gets_a_gradient(noise_conditioned):
    net = gpt(noise_conditioned=noise_conditioned)
    call(net, torch.randn(5, HORIZON, 2), 100 * torch.arange(5), context(5)).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_rows_do_not_mix():
    net = gpt()
    x, level, given = torch.randn(4, HORIZON, 2), 100 * torch.arange(4), context(4)
    alone = Context(given.steps[2:3], given.goal[2:3], given.task[2:3], given.task_index[2:3])
    whole, one = call(net, x, level, given), call(net, x[2:3], level[2:3], alone)
    torch.testing.assert_close(whole[2:3], one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changed", range(HORIZON))
def test_actions_see_earlier_actions_only(changed):
    net = gpt()
    x, level, given = torch.randn(1, HORIZON, 2), torch.tensor([50.0]), context(1)
    other = x.clone()
    other[:, changed] += 1
    difference = (call(net, x, level, given) - call(net, other, level, given)).abs().amax(dim=(0, 2))
    assert (difference[:changed] == 0).all()
    assert (difference[changed:] > 1e-4).all()


@pytest.mark.parametrize("part", ["steps", "goal", "task", "level"])
def test_every_action_sees_the_whole_context_and_the_noise_level(part):
    net = gpt()
    x, level, given = torch.randn(1, HORIZON, 2), torch.tensor([50.0]), context(1)
    changed = {name: getattr(given, name) for name in ("steps", "goal", "task")} | {"level": level}
    changed[part] = changed[part] + 1 if part != "level" else level - 500
    other = Context(changed["steps"], changed["goal"], changed["task"], given.task_index)
    difference = (call(net, x, level, given) - call(net, x, changed["level"], other)).abs().amax(dim=(0, 2))
    assert (difference > 1e-4).all()


@pytest.mark.parametrize("noise_conditioned", [False, True])
def test_one_noise_row_stands_for_all(noise_conditioned):
    net = gpt(noise_conditioned=noise_conditioned)
    x, cond = torch.randn(3, HORIZON, 2), net.condition(context(3))
    broadcast, rows = net.embed(torch.tensor([7.0])), net.embed(torch.full((3,), 7.0))
    torch.testing.assert_close(net(x, broadcast, cond), net(x, rows, cond))


def test_levels_of_a_schedule_are_embedded_at_once_and_alike():
    net = gpt()
    levels = torch.tensor([-1300.0, -20.0, 0.0, 400.0])
    for noise, level in zip(net.at_levels(levels), levels, strict=True):
        torch.testing.assert_close(noise, net.embed(level[None]))


def test_attention_is_torch_multi_head_attention():
    torch.manual_seed(0)
    ours, theirs = SelfAttention(16, 4, causal=True), nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.out.weight,
            "out_proj.bias": ours.out.bias,
        }
    )
    x = torch.randn(3, 7, 16)
    future = torch.ones(7, 7, dtype=torch.bool).triu(1)
    torch.testing.assert_close(ours(x), theirs(x, x, x, attn_mask=future)[0], rtol=1e-4, atol=1e-5)


def silent(block):
    """A block whose branches add nothing."""
    for last in (block.attention.out, block.feed_forward.down):
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return block


def test_the_stream_passes_a_block_unchanged_where_its_branches_are_silent():
    """Also its size: the residual of the feed-forward part is not the normalised stream."""
    x = 100 * torch.randn(2, 5, 16) + 30
    torch.testing.assert_close(silent(GptBlock(16, 4, Mlp(16, 32)))(x, torch.randn(2, 16), None), x)


def test_noise_conditioned_attention_adds_the_noise_to_every_token():
    torch.manual_seed(0)
    x, noise = torch.randn(2, 5, 16), torch.randn(2, 16)
    block = GptBlock(16, 4, Mlp(16, 32), noise_conditioned=True)
    nn.init.zeros_(block.feed_forward.down.weight)
    nn.init.zeros_(block.feed_forward.down.bias)
    wanted = x + block.attention(block.attention_norm(x) + noise[:, None])
    torch.testing.assert_close(block(x, noise, None), wanted)
    plain = GptBlock(16, 4, Mlp(16, 32))
    torch.testing.assert_close(plain(x, noise, None), plain(x, -noise, None))


def test_the_feed_forward_part_is_told_what_is_meant_for_its_block():
    heard = []

    class Listening(Mlp):
        def forward(self, x, noise=None):
            heard.append(noise)
            return super().forward(x)

    net = gpt()
    for block in net.blocks:
        block.feed_forward = Listening(DIM, 2 * DIM)
    noise = net.embed(torch.tensor([3.0]))
    cond = net.condition(context(1))
    net.denoise(torch.randn(1, HORIZON, 2), noise, ["first", "second"], cond)
    assert heard == ["first", "second"]
    net(torch.randn(1, HORIZON, 2), noise, cond)
    assert heard[2] is noise and heard[3] is noise


def test_dropout_keeps_the_mean_and_drops_its_share():
    kept = draw_dropout(200, 3, 16, 0.2, torch.Generator().manual_seed(0))
    assert kept.shape == (200, 3, 2, 16)
    assert kept.mean().item() == pytest.approx(1, abs=0.02)
    assert (kept == 0).float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert torch.equal(kept, draw_dropout(200, 3, 16, 0.2, torch.Generator().manual_seed(0)))


def test_dropout_scales_both_branches_of_each_block():
    net = gpt()
    x, noise, cond = torch.randn(4, HORIZON, 2), net.embed(torch.tensor([3.0])), net.condition(context(4))
    ones = torch.ones(4, LAYERS, 2, DIM)
    torch.testing.assert_close(net(x, noise, (*cond, ones)), net(x, noise, cond))
    # with all branches dropped the head sees the action's own token alone
    torch.testing.assert_close(net(x, noise, (*cond, 0 * ones)), net.head(net.action_tokens(x)))
    for layer in range(LAYERS):
        for branch in range(2):
            kept = ones.clone()
            kept[0, layer, branch] = 0
            difference = (net(x, noise, (*cond, kept)) - net(x, noise, cond)).abs().amax(dim=(1, 2))
            assert difference[0] > 1e-4 and (difference[1:] < 1e-6).all()


def test_the_linear_embedding_sees_a_quarter_of_log_sigma():
    net = LinearNoiseEmbedding(4)
    sigma = torch.tensor([0.005, 0.3, 1.0])
    level = EdmProcess(EdmConfig()).network_level(sigma)
    torch.testing.assert_close(net(level), net.linear((sigma.log() / 4)[:, None]))


def test_the_sinusoidal_embedding_tells_levels_of_all_processes_apart():
    torch.manual_seed(0)
    embedded = SinusoidalNoiseEmbedding(32)(torch.tensor([-1300.0, -50.0, 0.0, 1.0, 99.0, 1000.0]))
    distance = torch.cdist(embedded, embedded) + torch.eye(6)
    assert distance.min() > 1e-2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"heads": 3}, "heads=3 must divide dim=16"),
        ({"heads": 0}, "heads=0 must divide"),
        ({"layers": 0}, "layers=0 must be at least 1"),
        ({"dim": 15}, "dim=15 must be even"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        gpt(**sizes)
