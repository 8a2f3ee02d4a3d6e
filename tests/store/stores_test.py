import pytest

from variator_jax.errors import CheckpointError
from variator_jax.store import stores


def test_urls_and_folders_become_stores(tmp_path):
    bucket = stores.folder("gs://t5-data/checkpoint_1000000")
    assert bucket == {"driver": "gcs", "bucket": "t5-data", "path": "checkpoint_1000000/"}
    assert stores.below(bucket, "/state/")["path"] == "checkpoint_1000000/state/"
    assert stores.folder("s3://t5-data/c/")["bucket"] == "t5-data"
    spaced = tmp_path / "a b%20"
    spaced.mkdir()
    (spaced / "key").write_bytes(b"value")
    assert stores.read_key(stores.folder(spaced), "key") == b"value"
    assert stores.read_key(stores.folder(spaced), "other") is None
    assert stores.is_url("gs://a") and not stores.is_url(tmp_path) and not stores.is_url("/a")


def test_unknown_urls_are_refused():
    with pytest.raises(CheckpointError, match="nonsense://b/c cannot be opened"):
        stores.folder("nonsense://b/c")
