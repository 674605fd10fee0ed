"""A sentence for the user stays whole on its way from a worker."""

import pytest
from torch.utils.data import DataLoader, Dataset

from lcm.core.errors import UserError

SENTENCE = "its caption says: UserError: no cats\nand more"


class Refusing(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        try:
            raise UserError("another")
        except UserError as error:
            raise UserError(SENTENCE) from error


@pytest.mark.parametrize("workers", [0, 1])
def test_a_message_is_cut_only_where_a_worker_put_its_traceback_before_it(workers: int) -> None:
    with pytest.raises(UserError) as caught:
        next(iter(DataLoader(Refusing(), num_workers=workers)))
    assert str(caught.value) == SENTENCE


@pytest.mark.parametrize("message", ["UserError: a", "a UserError: b", "lcm.core.errors.UserError: a"])
def test_a_message_may_speak_of_errors(message: str) -> None:
    assert str(UserError(message)) == message
