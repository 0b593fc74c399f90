"""Downloads against a server on this machine: resumed, checked, and clear when they fail."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from coconut_ds.errors import DataError
from preprocessing import downloading
from preprocessing.downloading import Download, fetch

CONTENT = bytes(range(256)) * 4096
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        """The hub's answer: the digest, and where the file is, on another host."""
        self.send_response(302)
        self.send_header("Location", self.server.url.replace("127.0.0.1", "localhost") + "/file")
        self.send_header("X-Linked-ETag", f'"{self.server.promised}"')
        self.end_headers()

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Range")))
        if self.path == "/absent":
            return self.send_error(404)
        if self.path == "/hub":
            return self.do_HEAD()
        start = 0
        if self.headers.get("Range") and self.path != "/no-ranges":
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            if start >= len(CONTENT):
                return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.end_headers()
        body = CONTENT[start:]
        if self.server.cuts:
            self.server.cuts -= 1
            body = body[: len(body) // 2]
            self.close_connection = True
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 16)  # else 10 MiB
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.cuts, server.promised = [], 0, DIGEST
    server.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(downloading, "HUB", server.url + "/hub")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_file_arrives_once(server, tmp_path):
    target = tmp_path / "cache" / "file"
    assert fetch(Download(server.url + "/file", DIGEST), target).read_bytes() == CONTENT
    fetch(Download(server.url + "/file", DIGEST), target)
    assert len(server.requests) == 1 and [path.name for path in target.parent.iterdir()] == ["file"]


def test_an_interrupted_download_goes_on_where_it_stopped(server, tmp_path):
    server.cuts = 2
    fetch(Download(server.url + "/file", DIGEST), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    half = len(CONTENT) // 2
    assert [asked for _, asked in server.requests] == [None, f"bytes={half}-", f"bytes={half + half // 2}-"]


def test_a_part_of_an_earlier_call_is_continued(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    fetch(Download(server.url + "/file", DIGEST), tmp_path / "file")
    assert server.requests == [("/file", "bytes=1000-")] and (tmp_path / "file").read_bytes() == CONTENT


def test_a_server_without_ranges_sends_everything_again(server, tmp_path):
    (tmp_path / "file.part").write_bytes(b"x" * 1000)
    fetch(Download(server.url + "/no-ranges", DIGEST), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_part_that_is_whole_needs_nothing_more(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)
    fetch(Download(server.url + "/file", DIGEST), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_connection_that_keeps_breaking_leaves_a_part_to_continue(server, tmp_path):
    server.cuts = 99
    with pytest.raises(DataError, match="keeps what has arrived"):
        fetch(Download(server.url + "/file", DIGEST), tmp_path / "file")
    assert not (tmp_path / "file").exists() and 0 < (tmp_path / "file.part").stat().st_size < len(CONTENT)


def test_another_content_than_promised_is_deleted(server, tmp_path):
    with pytest.raises(DataError, match="was deleted"):
        fetch(Download(server.url + "/file", "0" * 64), tmp_path / "file")
    server.promised = "1" * 64
    with pytest.raises(DataError, match="not 1111"):
        fetch(Download(server.url + "/hub"), tmp_path / "file")
    assert list(tmp_path.iterdir()) == []
    server.promised = DIGEST
    assert fetch(Download(server.url + "/hub"), tmp_path / "file").read_bytes() == CONTENT


def test_a_file_that_is_there_is_checked(tmp_path):
    (tmp_path / "file").write_bytes(b"something else")
    with pytest.raises(DataError, match="delete it to download it again"):
        fetch(Download("http://127.0.0.1:1/file", DIGEST), tmp_path / "file")


@pytest.mark.parametrize("path", ["/absent", None])
def test_what_to_do_by_hand_is_said_and_no_folder_is_left(server, tmp_path, path):
    url = server.url + path if path else "http://127.0.0.1:1/file"
    target = tmp_path / "data" / "cache" / "file"
    with pytest.raises(DataError) as caught:
        fetch(Download(url, DIGEST), target)
    text = str(caught.value)
    assert f"fetch {url}" in text and f"put it at {target}" in text and DIGEST in text
    assert list(tmp_path.iterdir()) == []
