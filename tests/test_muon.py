"""Muon and AdamW: which parameter goes to which, and what a step is."""

import numpy as np
import pytest
import torch
from torch import nn

from moddiff.tiny import muon
from moddiff.tiny.codec_stages import VAEStage
from moddiff.tiny.muon import Muon, Recipe, optimisers, orthogonalise


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 5, 5)])
def test_orthogonalise_is_near_the_polar_factor(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    found = torch.linalg.svdvals(orthogonalise(g))
    assert ((found > 0.6) & (found < 1.3)).all()
    alike = torch.nn.functional.cosine_similarity(orthogonalise(g).flatten(1), (u @ v).flatten(1))
    assert (alike > 0.95).all()


def test_muon_steps_are_the_same_alone_and_in_a_batch_of_one_shape():
    torch.manual_seed(0)
    pair = [nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(4, 6))]
    lone = nn.Parameter(pair[1].detach().clone())
    both, single = Muon(pair, lr=0.1), Muon([lone], lr=0.1)
    for p in pair:
        p.grad = torch.ones_like(p) * torch.arange(6)
    lone.grad = pair[1].grad.clone()
    both.step()
    single.step()
    torch.testing.assert_close(pair[1], lone)


def test_matrices_go_to_muon_and_the_rest_to_adam():
    model = nn.ModuleDict(dict(a=nn.Linear(3, 4), token_embedding=nn.Embedding(5, 3), norm=nn.LayerNorm(3)))
    muon, adam = optimisers(model, Recipe(0.1, 0.1, 0.9, ("token_embedding",)))
    assert [tuple(p.shape) for p in muon.param_groups[0]["params"]] == [(4, 3)]
    assert sum(p.numel() for p in adam.param_groups[0]["params"]) == 4 + 15 + 6


@pytest.mark.parametrize("pays", [False, True])
def test_orthogonalise_and_a_stage_work_in_either_precision(tmp_path, monkeypatch, pays):
    """Machines with and without fast bfloat16 both train: the same type of weights, nearly the same step."""
    monkeypatch.setattr(muon, "half_pays", lambda: pays)
    g = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(1))
    found = muon.orthogonalise(g)
    assert found.dtype == torch.float32
    singular = torch.linalg.svdvals(found)
    assert ((singular > 0.6) & (singular < 1.3)).all()
    stage = VAEStage(frame_steps=10)
    batch = stage.draw(0, np.random.default_rng(0))
    loss, _ = stage.loss(**batch)
    loss.backward()
    gradients = [p.grad for p in stage.model.parameters() if p.grad is not None]
    assert loss.dtype == torch.float32 and {g.dtype for g in gradients} == {torch.float32}
    monkeypatch.setattr(muon, "half_pays", lambda: False)
    reference, _ = stage.loss(**batch)
    assert abs(float(loss.detach() - reference.detach())) < 0.02 * float(reference.detach())
