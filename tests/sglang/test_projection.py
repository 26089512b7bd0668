"""A sparse layer's projection holds on each rank what that rank's heads need, and the router decides as in fp32."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from msa_backend.model.config import M3Config

from ..model import configs

CONFIG = M3Config.from_text_config(configs.original())
MSA = CONFIG.msa


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_each_rank_has_its_heads(ranks: int, monkeypatch: pytest.MonkeyPatch):
    """Queries in order over the ranks; of the rest, what groups of ranks share, on each of them."""
    from sglang.srt.layers import linear

    from msa_backend.model.sglang import projection

    if MSA.num_heads % ranks:
        pytest.skip(f"{MSA.num_heads} heads")
    parts = {"q": MSA.num_heads, "k": MSA.num_kv_heads, "v": MSA.num_kv_heads}
    parts |= {"index_q": MSA.num_index_heads, "index_k": 1}
    whole = {name: torch.randn(heads * MSA.head_dim, CONFIG.hidden_size) for name, heads in parts.items()}
    monkeypatch.setattr(projection, "get_parallel", lambda: SimpleNamespace(tp_size=ranks))
    monkeypatch.setattr(linear, "_resolve_linear_group", lambda group: None)
    for rank in range(ranks):
        monkeypatch.setattr(linear, "get_group_rank_size", lambda group, rank=rank: (rank, ranks))
        made = projection.QKVIndexProjection(CONFIG, None, "qkv_proj")
        for name, weight in whole.items():
            made.weight.weight_loader(made.weight, weight, name)
        mine = []
        for name, heads in parts.items():
            each = max(1, heads // ranks)
            first = rank * heads // ranks if heads >= ranks else rank // (ranks // heads)
            mine.append(whole[name][first * MSA.head_dim : (first + each) * MSA.head_dim])
        torch.testing.assert_close(made.weight.data, torch.cat(mine), atol=0, rtol=0)


def test_fp32_weights_are_the_sum_of_their_parts():
    from msa_backend.model.sglang.router import bf16_parts

    torch.manual_seed(0)
    weight = torch.randn(8, 64)
    parts = bf16_parts(weight)
    assert len(parts) == 3
    assert torch.equal(sum(part.double() for part in parts), weight.double())
    assert len(bf16_parts(weight.bfloat16().float())) == 1


def test_a_router_s_parts_decide_as_its_fp32_weights(monkeypatch: pytest.MonkeyPatch):
    """On a CPU, where a product of bf16 does not sum into fp32: the same products, computed in fp64."""
    from msa_backend.model.sglang import router

    torch.manual_seed(0)
    made = router.Router(CONFIG, "gate")
    made.weight.data.normal_()
    x = torch.randn(40, CONFIG.hidden_size).bfloat16()
    made.finish_loading()
    assert made.parts is None
    torch.testing.assert_close(made(x), x.float() @ made.weight.data.t())

    made.cuts = True
    made.finish_loading()
    seen = []

    def product(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        seen.append(b.shape)
        return (a.double() @ b.double()).to(out_dtype)

    monkeypatch.setattr(router.torch, "mm", product)
    expected = x.double() @ made.weight.data.double().t()
    torch.testing.assert_close(made(x).double(), expected, atol=1e-5, rtol=1e-6)
    assert seen == [(CONFIG.hidden_size, 3 * CONFIG.num_experts)]
    where = made.parts.data_ptr()
    made.weight.data.mul_(2)
    made.finish_loading()
    assert made.parts.data_ptr() == where, "a graph would go on with the old weights"
    torch.testing.assert_close(made(x).double(), 2 * expected, atol=2e-5, rtol=1e-6)
