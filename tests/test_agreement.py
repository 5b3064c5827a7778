"""What hosts prove to one another: here what only some of them know."""

import types

import numpy as np
import pytest

from jaxtune import agreement, hosts
from jaxtune.config import Config


@pytest.fixture
def hosts_that_know(monkeypatch):
    """hosts_that_know([True, False, ...]) is a run of as many hosts, of which those know the rows of its windows."""

    def of(known):
        monkeypatch.setattr(hosts, "count", lambda: len(known))
        monkeypatch.setattr(hosts, "names", lambda: [f"host {i}" for i in range(len(known))])
        monkeypatch.setattr(hosts, "gather", lambda value: known)

    return of


def config(prepared, **train):
    data = {"train": ({"path": "a.jsonl"},), "prepared": prepared}
    return Config(output="unused", model={"path": "unused"}, data=data, train={"batch_rows": 8, **train})


STREAM = types.SimpleNamespace(rows_of_windows=np.zeros(3, np.int64))


def test_a_cache_that_only_some_hosts_have_stops_all_of_them(hosts_that_know):
    hosts_that_know([True, False, True, False])
    with pytest.raises(ValueError, match=r"auto has .* on 2 of 4 hosts, but not on host 1, host 3, .*gs://") as error:
        agreement.check_counted(config("auto"), STREAM)
    assert "train.steps" in str(error.value)
    hosts_that_know([False] * 8 + [True])
    with pytest.raises(ValueError, match=r"/disk/p has .* on 1 of 9 hosts, but not on host 0, .* host 4 and 3 more"):
        agreement.check_counted(config("/disk/p"), types.SimpleNamespace(rows_of_windows=None))


@pytest.mark.parametrize("known", [[True, True], [False, False], [True]])
def test_hosts_that_all_know_or_all_do_not_go_on(hosts_that_know, known):
    hosts_that_know(known)
    agreement.check_counted(config("auto"), STREAM)


def test_with_steps_given_nothing_is_compared(hosts_that_know):
    hosts_that_know([True, False])
    agreement.check_counted(config("auto", steps=3), STREAM)
    agreement.check_counted(config("auto"), None)
