import pytest

from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.profiles.measure.side import make_rules


def test_a_side_needs_its_time_its_queries_and_its_blocks():
    rules = make_rules(1.0)
    assert not rules.enough(0.9, 1000, 1000)
    assert not rules.enough(2.0, 63, 1000)
    assert not rules.enough(2.0, 64, 19)
    assert rules.enough(1.0, 64, 20)
    assert rules.enough(0.1, 1, 1, wall_s=6.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seconds": float("inf")}, "seconds is inf"),
        ({"seconds": float("nan")}, "seconds is nan"),
        ({"seconds": -1.0}, "seconds is -1.0"),
        ({"min_queries": 0}, "min_queries is 0"),
    ],
)
def test_rules_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_rules(**changes)
