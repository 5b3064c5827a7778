"""`python -m jaxtune.prepare --runner=...`: Apache Beam makes what the pool makes. Run by `make test-beam`."""

import pytest
import tiny_runs
import transformers
from prepared_folders import assert_complete, contents, folder_in, words

from jaxtune import prepare

pytestmark = pytest.mark.beam


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model's folder without weights, which preparing does not read."""
    folder = tmp_path_factory.mktemp("model")
    shape = transformers.LlamaConfig(
        vocab_size=280, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256,
    )  # fmt: skip
    shape.save_pretrained(folder)
    return tiny_runs.write_tokenizer(folder)


@pytest.fixture
def data(tmp_path):
    return tiny_runs.write_rows(tmp_path / "data.jsonl", tiny_runs.rows(160))


def test_beam_makes_the_same_shards(base, data, tmp_path):
    assert prepare.main([*words(base, data, tmp_path), "--workers=1"]) == 0
    pool = contents(folder_in(tmp_path / "prepared"))
    with_beam = words(base, data, tmp_path, f"data.prepared={tmp_path / 'beam'}")
    assert prepare.main([*with_beam, "--runner=Direct"]) == 0
    assert contents(folder_in(tmp_path / "beam")) == pool
    assert_complete(folder_in(tmp_path / "beam"), 20)


def test_dataflow_is_refused_where_its_workers_cannot_read(base, data, tmp_path, capsys):
    assert prepare.main([*words(base, data, tmp_path), "--runner=Dataflow", "--project=p"]) == 1
    assert "workers of Dataflow cannot read" in capsys.readouterr().err
