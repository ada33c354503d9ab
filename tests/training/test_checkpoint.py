import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from robopolicy.errors import UserError
from robopolicy.training.checkpoint import has_checkpoint, load_checkpoint, save_checkpoint


def state(seed):
    torch.manual_seed(seed)
    model = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    return model, EMAModel(model.parameters(), foreach=True), optimizer


def test_round_trip(tmp_path):
    model, ema, optimizer = state(0)
    ema.step(model.parameters())
    save_checkpoint(tmp_path, 12, model, ema, optimizer, {"best": [[0.5, 4]]})
    other, other_ema, other_optimizer = state(1)
    loaded = load_checkpoint(tmp_path, other, other_ema, other_optimizer)
    assert loaded["step"] == 12 and loaded["best"] == [[0.5, 4]] and other_ema.optimization_step == 1
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(ema.shadow_params[0], other_ema.shadow_params[0])
    for index, entry in optimizer.state_dict()["state"].items():
        for name, value in entry.items():
            assert torch.equal(value, other_optimizer.state_dict()["state"][index][name])


def test_a_half_written_checkpoint_is_never_current(tmp_path):
    parts = state(0)
    save_checkpoint(tmp_path, 1, *parts, {})
    (tmp_path / ".step_00000002.partial").mkdir()
    (tmp_path / ".step_00000002.partial" / "model.safetensors").write_bytes(b"torn")
    assert load_checkpoint(tmp_path, *state(1))["step"] == 1
    save_checkpoint(tmp_path, 2, *parts, {})
    assert load_checkpoint(tmp_path, *state(1))["step"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last", "step_00000002"]


def test_damage_and_absence_are_named(tmp_path):
    assert not has_checkpoint(tmp_path)
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_checkpoint(tmp_path, *state(0))
    target = save_checkpoint(tmp_path, 1, *state(0), {})
    (target / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint(tmp_path, *state(0))


def test_another_architecture_is_named(tmp_path):
    save_checkpoint(tmp_path, 1, *state(0), {})
    model = nn.Linear(4, 3)
    with pytest.raises(UserError, match="another architecture"):
        load_checkpoint(tmp_path, model, EMAModel(model.parameters()), torch.optim.AdamW(model.parameters()))
