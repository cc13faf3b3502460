"""Is a product the same whichever way it is computed, and does a layer keep to its dtype?"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from moddiff.attention import attend
from moddiff.linear import Linear, Linear32, onednn, product


@pytest.mark.parametrize("rows", [(), (1,), (3, 50), (2, 0)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_product_equals_that_of_torch_to_rounding(rows, with_bias):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(*rows, 33), torch.randn(17, 33), torch.randn(17) if with_bias else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(product(x, weight, bias).double(), expected, atol=2e-5, rtol=1e-5)


def test_rows_of_a_larger_tensor_are_taken_as_they_lie():
    torch.manual_seed(0)
    x, weight = torch.randn(8, 40, 3).transpose(1, 2), torch.randn(40, 9).t()  # neither is contiguous
    torch.testing.assert_close(product(x, weight), F.linear(x, weight), atol=2e-5, rtol=1e-5)


def test_a_derivative_is_there_for_those_who_want_one():
    torch.manual_seed(0)
    layer, x = Linear(6, 4), torch.randn(5, 6, requires_grad=True)
    assert not onednn(x, layer.weight)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.detach().sum(0).expand(5, 6))
    torch.testing.assert_close(layer.weight.grad, x.detach().sum(0).expand(4, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_layer_computes_in_the_dtype_of_its_weights(dtype):
    layer, x = Linear(6, 4).to(dtype), torch.randn(5, 6)
    assert layer(x).dtype == dtype
    assert Linear32(6, 4).to(dtype)(x.to(dtype)).dtype == torch.float32


def test_a_float32_layer_stays_so_under_autocast():
    torch.manual_seed(0)
    exact, plain, x = Linear32(64, 8), Linear(64, 8), torch.randn(5, 64)
    with torch.no_grad():
        alone = exact(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(exact(x), alone)
            assert (
                plain(x).dtype == torch.bfloat16
            )  # the others follow autocast, as a linear layer of torch's


def test_a_compiler_gets_one_graph_and_the_same_numbers():
    torch.manual_seed(0)
    layer, x = Linear(16, 16).requires_grad_(False), torch.randn(4, 16)
    graph = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(graph(x), layer(x), atol=1e-6, rtol=1e-6)


def counted(function, *inputs):
    with FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops()


def test_torchs_counter_of_operations_sees_products_with_gradients_and_without():
    layer, x = Linear(48, 16), torch.randn(3, 5, 48)
    with torch.enable_grad():
        assert counted(layer, x) == 2 * 15 * 48 * 16
    with torch.no_grad():
        assert counted(layer, x) == 2 * 15 * 48 * 16
        q, k, v = torch.randn(1, 2, 1100, 8), torch.randn(1, 2, 1000, 8), torch.randn(1, 2, 1000, 8)
        assert counted(attend, q, k, v) == 4 * 2 * 1100 * 1000 * 8
