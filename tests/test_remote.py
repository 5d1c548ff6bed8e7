# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in emulated storage services, which also fail, refuse and lack things."""

import http.server
import re
import socket
import threading

import numpy as np
import pytest
import storage_emulators
import tiny_switch
from classic_t5x import write_files

from qmoe_jax.checkpoints import kvstore, remote, source, t5x
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.runs import import_pack, inspect_checkpoint

# Name in the bucket -> folder, and the model in it.
LAYOUTS = {
    "classic/checkpoint_500100": "tiny_switch_base/legacy/checkpoint_500100",
    "2024/checkpoint_634600": "tiny_switch_xxl/orbax/checkpoint_634600",
    "2026/checkpoint_500100": "tiny_switch_base_2026/orbax/checkpoint_500100",
}
CLASSIC = "classic/checkpoint_500100"


@pytest.fixture(scope="session", params=["gs", "s3"])
def filled(request, tmp_path_factory):
    """An emulator with a checkpoint of every layout, and folders of other formats."""
    with storage_emulators.running(request.param) as service, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", service.endpoint)
        for path, folder in LAYOUTS.items():
            storage_emulators.upload(service, tiny_switch.DATA / folder, path)
        others = tmp_path_factory.mktemp("others")
        write_files(others, {"config.json": b"{}"})
        storage_emulators.upload(service, others, "huggingface")
        write_files(others, {"noexp.pt": b"x", "sizes.pt": b"x"})
        storage_emulators.upload(service, others, "published")
        write_files(others, {"manifest.json": b"{}"})
        storage_emulators.upload(service, others, "packed")
        yield service


@pytest.fixture
def no_credentials(monkeypatch, tmp_path):
    """A user who has never logged in anywhere, and is not patient."""
    for name in (*remote._AWS_VARIABLES, *remote._AWS_FILES, "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_AUTH_TOKEN_FOR_TESTING"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(remote, "RETRIES", remote.RETRIES | {"initial_delay": "10ms"})


@pytest.fixture
def service(filled, no_credentials, monkeypatch):
    filled.reset()
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", filled.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", filled.endpoint)
    return filled


@pytest.mark.parametrize("below", ["", "/.."])
@pytest.mark.parametrize("path", LAYOUTS)
def test_every_layout_is_read_in_place(path, below, service):
    path_in_bucket = path.partition("/")[0] if below else path
    opened = t5x.open_checkpoint(service.url(path_in_bucket))
    local = t5x.open_checkpoint(tiny_switch.DATA / LAYOUTS[path])
    assert opened.path == service.url(path)
    assert (opened.step, opened.leaves) == (local.step, local.leaves)
    values = t5x.read_many(opened, list(opened.leaves))
    for name, expected in t5x.read_many(local, list(local.leaves)).items():
        np.testing.assert_array_equal(values[name], expected, err_msg=name, strict=True)


def test_the_road_from_a_runs_path(service):
    """Each `//` stays one from the setting to the reader."""
    url = service.url(CLASSIC)
    described = inspect_checkpoint.describe(url)
    assert (described.path, described.format, described.step) == (url, "t5x", 500100)
    opened = source.open_source(url + "/")
    groups = list(opened.expert_groups("encoder", 1, 3))
    name = "encoder/layers_1/mlp/expert/wo/kernel"
    experts = np.concatenate([group.arrays["wo"] for group in groups])
    np.testing.assert_array_equal(experts, tiny_switch.flat_params("tiny_switch_base")[name])


@pytest.mark.parametrize("fault", [429, 503, 0])
def test_passing_failures_are_retried(fault, service):
    service.faults.extend([fault] * 5)
    opened = t5x.open_checkpoint(service.url(CLASSIC))
    assert not service.faults
    service.faults.extend([fault] * 5)
    name = next(iter(opened.leaves))
    np.testing.assert_array_equal(
        t5x.read(opened, name), tiny_switch.flat_params("tiny_switch_base")[name]
    )


@pytest.mark.parametrize("layout", ["classic", "2026"])
def test_lasting_failures_end(layout, service):
    opened = t5x.open_checkpoint(service.url(layout))
    name = "encoder/layers_1/mlp/expert/wo/kernel"
    service.faults.extend([503] * 1000)
    with pytest.raises(CheckpointError, match=rf"`{name}` of {opened.path}.*did not answer"):
        t5x.read(opened, name)
    with pytest.raises(CheckpointError, match=rf"{service.url(CLASSIC)}.*did not answer as it"):
        t5x.open_checkpoint(service.url(CLASSIC))


def test_a_dead_host_ends_within_about_two_minutes():
    delays = [2.0**i for i in range(remote.RETRIES["max_retries"])]
    assert max(delays) == float(remote.RETRIES["max_delay"].removesuffix("s"))
    sends = len(delays) + 1
    for name in ("CONNECT_TIMEOUT", "LOW_SPEED_TIME"):
        each = float(remote.TIMEOUTS[f"TENSORSTORE_CURL_{name}_SECONDS"])
        assert sum(delays) + len(delays) + sends * each < 130


def test_nobody_there(service, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    with pytest.raises(CheckpointError, match=r"connect.*did not answer .*_URL.*try again"):
        t5x.open_checkpoint(service.url(CLASSIC))


LOGIN = {"gs": "gcloud auth application-default login", "s3": "AWS_ACCESS_KEY_ID"}


def test_missing_credentials(service):
    service.needs_login = True
    for path in ("classic", CLASSIC):
        with pytest.raises(CheckpointError, match=LOGIN[service.scheme]) as caught:
            source.open_source(service.url(path))
        assert service.url(path) in str(caught.value)


def test_credentials_are_missed_later(service):
    opened = t5x.open_checkpoint(service.url(CLASSIC))
    service.needs_login = True
    with pytest.raises(CheckpointError, match=LOGIN[service.scheme]):
        t5x.read(opened, next(iter(opened.leaves)))


def test_a_bucket_that_may_be_read_and_not_listed(service):
    service.lists = False
    for path in LAYOUTS:
        opened = t5x.open_checkpoint(service.url(path))
        t5x.read(opened, next(iter(opened.leaves)))
    with pytest.raises(CheckpointError, match=r"nothing is at that path"):
        t5x.open_checkpoint(service.url("classic"))


def test_nothing_there(service):
    with pytest.raises(CheckpointError, match=r"neither a T5X") as caught:
        source.open_source(service.url("nothing/checkpoint_5"))
    assert service.url("nothing/checkpoint_5") in str(caught.value)
    nowhere = f"{service.scheme}://no-such-bucket/checkpoint_5"
    with pytest.raises(CheckpointError, match=r"no such bucket|a bucket that does not") as caught:
        source.open_source(nowhere)
    assert nowhere in str(caught.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("huggingface", "is a Hugging Face folder: copy it to a local folder first"),
        ("published", "is a pack of the published QMoE code: copy it to a local"),
        ("packed", "is a packed checkpoint: copy it to a local folder first"),
    ],
)
def test_other_formats_are_not_read_in_place(path, message, service):
    for read in (source.open_source, inspect_checkpoint.describe):
        with pytest.raises(CheckpointError, match=re.escape(f"{service.url(path)} {message}")):
            read(service.url(path))


def test_published_packs_are_not_imported_in_place(tmp_path):
    with pytest.raises(CheckpointError, match=r"gs://bucket/pack: .*copy it"):
        import_pack.import_pack("gs://bucket/pack", str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


class Misbehaving(http.server.BaseHTTPRequestHandler):
    statuses: list[int]

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        status = self.statuses.pop() if len(self.statuses) > 1 else self.statuses[0]
        self.send_response(status)
        self.send_header("Content-Length", "1")
        self.end_headers()
        self.wfile.write(b"x")


@pytest.mark.parametrize(
    ("statuses", "message"),
    [([200, 503, 429, 500], None), ([503], "did not answer"), ([403], "wants a login")],
)
def test_plain_http(statuses, message, no_credentials):
    handler = type("Handler", (Misbehaving,), {"statuses": list(statuses)})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/checkpoint_1"
        store = kvstore.open_store(url)
        if message is None:
            assert kvstore.read_files(store, ["x"]) == [b"x"]
        else:
            with pytest.raises(CheckpointError, match=f"`x` in {url}.*{message}"):
                kvstore.read_files(store, ["x"])
        server.shutdown()


def test_private_s3_services(no_credentials, monkeypatch):
    spec = remote.store_spec("s3://bucket/a/")
    assert "endpoint" not in spec and "aws_region" not in spec  # the bucket tells its region
    assert spec["aws_credentials"] == {"type": "anonymous"}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://minio.example:9000/")
    spec = remote.store_spec("s3://bucket/a/")
    assert (spec["endpoint"], spec["aws_region"]) == ("https://minio.example:9000", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://s3.example")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    spec = remote.store_spec("s3://bucket/a/")
    assert (spec["endpoint"], spec["aws_region"]) == ("https://s3.example", "eu-west-1")


def test_where_aws_credentials_are_looked_for(no_credentials, monkeypatch, tmp_path):
    def login() -> str:
        return remote.store_spec("s3://bucket/a/")["aws_credentials"]["type"]

    assert login() == "anonymous"
    write_files(tmp_path, {".aws/config": b"", "vendor": b"Amazon EC2\n"})
    assert login() == "default"
    (tmp_path / ".aws" / "config").unlink()
    monkeypatch.setattr(remote, "_EC2_VENDOR", tmp_path / "vendor")
    assert login() == "anonymous"
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
    assert login() == "default"
    monkeypatch.setattr(remote, "_EC2_VENDOR", tmp_path / "none")
    assert login() == "anonymous"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    assert login() == "default"


@pytest.mark.parametrize("filled", ["s3"], indirect=True)
def test_credentials_are_sent(service, monkeypatch):
    service.needs_login = True
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    for path in LAYOUTS:
        opened = t5x.open_checkpoint(service.url(path))
        t5x.read(opened, next(iter(opened.leaves)))
