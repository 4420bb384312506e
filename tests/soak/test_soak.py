import pytest

from tests.soak.soak import soak


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "kills"), [(1, 5), (2, 5)])
def test_ten_kills_end_with_the_same_weights(tmp_path, ranks, kills):
    assert sum(soak(tmp_path, kills=kills, ranks=ranks, seed=0).values()) == kills
