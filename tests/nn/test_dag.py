"""The autoencoder, the readout and the penalty."""

import pytest
import torch

from lightning_hpo.functional.graphs.masked_attributes import AttributeMask, draw_mask, scaled_cosine_errors
from lightning_hpo.nn.dag import AffiliationReadout, GroupSparsity, MaskedAttributeAutoencoder

EDGES = torch.tensor([[0, 1, 1, 2, 2, 3, 3, 4], [1, 0, 2, 1, 3, 2, 4, 3]])


def network(**arguments):
    return MaskedAttributeAutoencoder(3, **{"hidden_channels": 8, "heads": 2, "dropout": 0, **arguments})


def test_masked_nodes_show_the_token_or_another_nodes_attributes():
    x, autoencoder = torch.rand(6, 3), network()
    autoencoder.token.data.fill_(7)
    mask = AttributeMask(torch.tensor([4, 1, 2]), torch.tensor([4]), torch.tensor([0]))
    shown = autoencoder.corrupt(x, mask)
    assert torch.equal(shown[[1, 2]], torch.full((2, 3), 7.0))
    assert torch.equal(shown[4], x[0])
    assert torch.equal(shown[[0, 3, 5]], x[[0, 3, 5]])
    assert x.max() < 7  # not in place
    none = AttributeMask(torch.tensor([0, 1]), torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long))
    assert (autoencoder.corrupt(x, none)[:2] == 7).all()  # no replacement: all masked nodes show the token


def test_the_decoder_sees_zeros_at_masked_nodes():
    autoencoder, codes = network(), torch.randn(5, 8, requires_grad=True)
    masked = torch.tensor([1, 3])
    hidden = autoencoder.hide(codes, masked)
    assert hidden[masked].abs().max() == 0
    assert hidden[[0, 2, 4]].abs().min() > 0
    autoencoder.decode(codes, EDGES, masked).square().sum().backward()
    assert codes.grad[masked].abs().max() == 0
    assert codes.grad[[0, 2, 4]].abs().max() > 0


def test_a_masked_node_is_reconstructed_from_others_alone():
    autoencoder, x = network(attention_dropout=0), torch.rand(5, 3)
    mask = AttributeMask(torch.tensor([2]), *[torch.empty(0, dtype=torch.long)] * 2)

    def found(x):
        return autoencoder.decode(autoencoder(autoencoder.corrupt(x, mask), EDGES), EDGES, mask.masked)[2]

    other = x.clone()
    other[2] = 5.0
    assert torch.equal(found(x), found(other))


def test_nodes_that_are_not_masked_get_no_gradient_from_their_own_error():
    x = torch.rand(5, 3)
    reconstruction = torch.rand(5, 3, requires_grad=True)
    mask = draw_mask(5, 0.5)
    scaled_cosine_errors(reconstruction[mask.masked], x[mask.masked])[0].backward()
    kept = [node for node in range(5) if node not in mask.masked.tolist()]
    assert reconstruction.grad[kept].abs().max() == 0
    assert (reconstruction.grad[mask.masked].abs().sum(1) > 0).all()


def test_codes_have_mean_zero_and_variance_one_and_follow_the_nodes():
    autoencoder = network().eval()
    x, order = torch.rand(5, 3), torch.tensor([3, 0, 4, 1, 2])
    codes = autoencoder(x, EDGES)
    torch.testing.assert_close(codes.mean(1), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(autoencoder(x[order], order.argsort()[EDGES]), codes[order])


def test_isolated_nodes_have_codes_too():
    assert network()(torch.rand(9, 3), EDGES).isfinite().all()


def test_dead_columns_have_no_mass_and_no_gradient_and_stay_dead():
    readout = AffiliationReadout(8, 5)
    readout.prune(torch.tensor([True, False, True, True, False]))
    P = readout(torch.randn(7, 8))
    assert P[:, [1, 4]].abs().max() == 0
    torch.testing.assert_close(P.sum(1), torch.ones(7))
    P.square().sum().backward()
    assert readout.head.weight.grad[[1, 4]].abs().max() == 0
    readout.prune(torch.ones(5, dtype=torch.bool))
    assert readout.live.tolist() == [True, False, True, True, False]
    with pytest.raises(ValueError, match="no community would be left"):
        readout.prune(torch.tensor([False, True, False, False, True]))


def test_the_readout_starts_as_a_mixture_of_gaussians():
    readout, codes, centres = AffiliationReadout(4, 3), torch.randn(6, 4), torch.randn(3, 4)
    readout.start_from(centres, torch.tensor(2.0), sharpness=3.0)
    expected = (-3.0 * torch.cdist(codes, centres).square() / 2.0).softmax(1)
    torch.testing.assert_close(readout(codes), expected)


def test_the_penalty_is_ramped_up():
    P = torch.eye(9)
    assert GroupSparsity(0.5)(P).item() == pytest.approx(0.5 * (3 - 1), abs=1e-5)
    assert [GroupSparsity(0.5, 4).strength(step) for step in (-1, 0, 1, 4, 9)] == [0, 0, 0.125, 0.5, 0.5]
    assert GroupSparsity(1.0)(torch.full((9, 4), 0.25)).item() == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="weight and ramp must be at least 0, got -1 and -2"):
        GroupSparsity(-1, -2)


def test_all_wrong_sizes_are_named():
    with pytest.raises(ValueError, match=r"in_channels must be a positive integer, got 0; dropout must be .* got 1"):
        MaskedAttributeAutoencoder(0, dropout=1)
    with pytest.raises(ValueError, match="hidden_channels must be a multiple of heads, got 10 and 4"):
        MaskedAttributeAutoencoder(3, hidden_channels=10)
