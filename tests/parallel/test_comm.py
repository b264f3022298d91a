import pytest
import torch

from qinfer.parallel.comm import Alone, Communicator


def test_alone_is_the_identity_without_a_copy() -> None:
    comm: Communicator = Alone()
    x = torch.arange(6.0).reshape(2, 3)
    expected = x.clone()
    for result in (
        comm.all_reduce(x),
        comm.all_reduce_parts(x),
        comm.all_gather(x, 1),
        comm.all_gather(x, -2),
        comm.broadcast(x),
    ):
        assert result is x
    assert torch.equal(x, expected)
    assert (comm.rank, comm.size) == (0, 1)


def test_alone_refuses_a_dimension_that_is_not_there() -> None:
    with pytest.raises(IndexError):
        Alone().all_gather(torch.zeros(2, 3), 2)
