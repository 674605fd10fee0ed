"""An error message of a worker reaches the user unchanged."""

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
def test_message_of_worker_is_whole(workers: int) -> None:
    with pytest.raises(UserError) as caught:
        next(iter(DataLoader(Refusing(), num_workers=workers)))
    assert str(caught.value) == SENTENCE


def test_message_may_name_errors() -> None:
    for message in ("UserError: a", "a UserError: b", "lcm.core.errors.UserError: a"):
        assert str(UserError(message)) == message
