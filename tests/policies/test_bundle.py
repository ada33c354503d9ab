import numpy as np
import pytest
import torch
import yaml

from robopolicy.errors import UserError
from robopolicy.manifest import bundle_fingerprint, read_manifest
from robopolicy.policies.bundle import load_bundle, save_bundle


@pytest.fixture
def bundle(make_policy, tmp_path):
    policy = make_policy(low=-3.0, high=5.0)
    return policy, save_bundle(policy, tmp_path / "bundle", task={"environment": "pusht"}, provenance={"seed": 7})


def edit(path, **changes):
    file = path / "bundle.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | changes))


def test_a_loaded_policy_gives_the_same_chunks(bundle):
    policy, path = bundle
    loaded, manifest = load_bundle(path)
    observations = {"observation.state": np.random.default_rng(0).normal(size=(4, 2, 2)).astype(np.float32)}
    chunks = [
        p.eval().act(observations, [torch.Generator().manual_seed(i) for i in range(4)]) for p in (policy, loaded)
    ]
    np.testing.assert_array_equal(*chunks)
    assert loaded.spec == policy.spec and loaded.config == policy.config
    assert manifest["task"]["environment"] == "pusht" and manifest["provenance"]["seed"] == 7


def test_saving_again_replaces_the_bundle(bundle, make_policy):
    _, path = bundle
    before = bundle_fingerprint(read_manifest(path))
    save_bundle(make_policy(low=-3.0, high=6.0), path)
    assert bundle_fingerprint(read_manifest(path)) != before
    assert [p.name for p in path.parent.iterdir()] == ["bundle"]


def test_a_truncated_file_is_refused(bundle):
    _, path = bundle
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="model.safetensors is truncated or changed"):
        load_bundle(path)


def test_a_missing_file_is_refused(bundle):
    _, path = bundle
    (path / "normalizer.safetensors").unlink()
    with pytest.raises(UserError, match="'normalizer.safetensors' is missing"):
        load_bundle(path)


def test_a_folder_that_is_no_bundle_says_what_it_found(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"not a bundle.*notes.txt"):
        load_bundle(tmp_path)
    with pytest.raises(UserError, match="found nothing"):
        load_bundle(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 9}, "format_version 9"),
        ({"kind": "critic"}, "holds a 'critic', wanted a policy"),
        ({"architecture": {"name": "diffusion_unett", "config": {}}}, "Did you mean 'diffusion_unet'"),
        ({"architecture": {"name": "os.system", "config": {}}}, "unknown architecture 'os.system'"),
        ({"architecture": {"name": "diffusion_unet", "config": {"kernal_size": 3}}}, "Did you mean 'kernel_size'"),
        ({"architecture": {"name": "diffusion_unet", "config": {"down_dims": [8, 8]}}}, "do not fit its architecture"),
        ({"spec": {"fps": 10}}, "the entry 'observations' is missing"),
        ({"files": dict.fromkeys(("model.safetensors", "normalizer.safetensors", "../x"), "0")}, "points outside"),
        ({"files": {}}, "lacks the checksum of 'model.safetensors'"),
        ({"architecture": ["diffusion_unet"]}, "'architecture' is damaged: expected a mapping"),
        ({"architecture": {}}, "unknown architecture ''"),
        ({"spec": {"observations": 3, "action": {}, "fps": 10}}, "expected a list, found 3"),
    ],
)  # fmt: skip
def test_damaged_manifests_end_in_one_clear_message(bundle, change, message):
    _, path = bundle
    edit(path, **change)
    with pytest.raises(UserError, match=message):
        load_bundle(path)


def test_nothing_in_the_manifest_is_executed(bundle, tmp_path):
    _, path = bundle
    canary = tmp_path / "canary"
    (path / "bundle.yaml").write_text(f"!!python/object/apply:os.system ['touch {canary}']")
    with pytest.raises(UserError, match="not valid YAML"):
        load_bundle(path)
    assert not canary.exists()
