"""FID's Inception against pytorch-fid's, of random weights in the published file's names."""

import jax
import numpy as np
import pytest

from convert.inception import open_inception

pytestmark = pytest.mark.parity


@pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")  # of scipy, in pytorch-fid
def test_features_and_distance(tmp_path, monkeypatch):
    import torch
    from pytorch_fid import fid_score, inception
    from safetensors.torch import save_file

    from unclip_jax.evaluation.frechet import frechet_distance, moments

    torch.manual_seed(0)
    bare = inception._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    bare.Mixed_5b, bare.Mixed_5c, bare.Mixed_5d = (
        inception.FIDInceptionA(c, p) for c, p in ((192, 32), (256, 64), (288, 64))
    )
    bare.Mixed_6b, bare.Mixed_6c, bare.Mixed_6d, bare.Mixed_6e = (
        inception.FIDInceptionC(768, c) for c in (128, 160, 160, 192)
    )
    bare.Mixed_7b, bare.Mixed_7c = inception.FIDInceptionE_1(1280), inception.FIDInceptionE_2(2048)
    with torch.no_grad():
        for module in bare.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
    monkeypatch.setattr(inception, "fid_inception_v3", lambda: bare)
    theirs = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).eval()
    saved = {name: value for name, value in bare.state_dict().items() if value.is_floating_point()}
    save_file(saved, str(tmp_path / "inception.safetensors"))
    torch.save(bare.state_dict(), tmp_path / "inception.pth")

    pictures = np.random.default_rng(0).random((6, 96, 80, 3), np.float32)
    with torch.no_grad():
        want = theirs(torch.from_numpy(pictures.transpose(0, 3, 1, 2)))[0][..., 0, 0].numpy()
    for name in ("inception.safetensors", "inception.pth"):
        network = open_inception(tmp_path / name)
        got = np.asarray(jax.jit(lambda params, x, n=network: n.merge(params)(x))(network.params, pictures))
        relative = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert relative < 1e-5, relative  # measured 4e-7

    rng = np.random.default_rng(1)
    one, two = rng.standard_normal((300, 24)), rng.standard_normal((200, 24)) * 1.3 + 0.2
    theirs_fid = fid_score.calculate_frechet_distance(
        one.mean(0), np.cov(one, rowvar=False), two.mean(0), np.cov(two, rowvar=False)
    )
    np.testing.assert_allclose(frechet_distance(moments(one), moments(two)), theirs_fid, rtol=1e-8)
