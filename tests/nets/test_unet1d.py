import pytest
import torch
from torch import nn

from robopolicy.nets.context import Context
from robopolicy.nets.short_group_norm import ShortGroupNorm
from robopolicy.nets.unet1d import ConditionalUnet1d


def unet(**options):
    torch.manual_seed(0)
    return ConditionalUnet1d(
        **{"action_dim": 3, "cond_dim": 10, "down_dims": (16, 32, 64), "step_embed_dim": 16, **options}
    )


def call(net, x, t, features):
    return net(x, net.embed(t), net.condition(Context(features[:, None])))


@pytest.mark.parametrize("horizon", [4, 8, 16, 32])
def test_output_has_the_shape_of_the_chunk(horizon):
    net = unet()
    out = call(net, torch.randn(5, horizon, 3), torch.arange(5), torch.randn(5, 10))
    assert out.shape == (5, horizon, 3)


def test_every_parameter_gets_a_gradient():
    net = unet()
    call(net, torch.randn(5, 16, 3), torch.arange(5), torch.randn(5, 10)).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_depends_on_chunk_step_and_condition():
    net = unet()
    x, t, c = torch.randn(1, 16, 3), torch.tensor([3]), torch.randn(1, 10)
    base = call(net, x, t, c)
    for other in (call(net, x + 1, t, c), call(net, x, t + 50, c), call(net, x, t, c + 1)):
        assert not torch.allclose(base, other, atol=1e-3)


def test_rows_do_not_mix():
    net = unet().eval()
    x, t, c = torch.randn(4, 16, 3), torch.arange(4), torch.randn(4, 10)
    whole = call(net, x, t, c)
    one = call(net, x[2:3], t[2:3], c[2:3])
    torch.testing.assert_close(whole[2:3], one, rtol=1e-4, atol=1e-5)


def test_a_far_action_reaches_every_output():
    net = unet().double()
    x = torch.randn(1, 16, 3, dtype=torch.double, requires_grad=True)
    call(net, x, torch.tensor([3]), torch.randn(1, 10, dtype=torch.double))[0, 0].sum().backward()
    assert (x.grad[0].abs().sum(1) > 0).all()


@pytest.mark.parametrize("length", [1, 4, 7, 8, 16])
def test_short_group_norm_is_torch_group_norm(length):
    torch.manual_seed(0)
    ours, theirs = ShortGroupNorm(4, 16).double(), nn.GroupNorm(4, 16).double()
    ours.weight.data.normal_()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 16, length, dtype=torch.double, requires_grad=True)
    y = torch.randn(3, 16, length, dtype=torch.double)
    torch.testing.assert_close(ours(x), theirs(x))
    (a,) = torch.autograd.grad((ours(x) * y).sum(), x)
    (b,) = torch.autograd.grad((theirs(x) * y).sum(), x)
    torch.testing.assert_close(a, b)
