"""Clips behind URLs: copied once, whole or not at all."""

import contextlib
import functools
import http.server
import socket
import threading

import pytest

from tests.test_data import config, mp4, shards  # noqa: F401 - fixtures
from univid.data.dataset import open_dataset


@contextlib.contextmanager
def served(folder, cut=None):
    """The folder over HTTP; ``cut``: files end after so many bytes, whatever their length says."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def copyfile(self, source, output):
            asked.append(self.path)
            output.write(source.read()[:cut])

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_urls(shards, tmp_path):  # noqa: F811
    cache = tmp_path / "cache"
    with served(shards) as (url, asked):
        for _ in range(2):
            data = open_dataset(config("", paths=(f"{url}/{{000..001}}.tar",), cache=str(cache)))
            assert [data[i].caption for i in (0, 5)] == ["clip 0", "clip 5"]
        assert sorted(asked) == ["/000.tar", "/001.tar"]
        with pytest.raises(OSError, match=r"could not be copied to .*: HTTP Error 404"):
            open_dataset(config("", paths=(f"{url}/none.tar",), cache=str(cache)))
    before = sorted(cache.iterdir())
    with served(shards, cut=2000) as (url, _), pytest.raises(OSError, match=r"it ended after 2000 of \d+ bytes"):
        open_dataset(config("", paths=(f"{url}/000.tar",), cache=str(cache)))
    assert {p.suffix for p in set(cache.iterdir()) - set(before)} <= {".lock"}


def test_signed_urls(shards, tmp_path):  # noqa: F811
    """Their queries are longer than a file's name may be."""
    with served(shards) as (url, _):
        paths = (f"{url}/000.tar?signature={'x' * 300}",)
        assert len(open_dataset(config("", paths=paths, cache=str(tmp_path / "cache")))) == 3
        (shards / "list.csv").write_text(f"path,caption\n{shards}/a.mp4,x\n")
        (shards / "download").write_bytes((shards / "list.csv").read_bytes())
        for name in ("list.csv?signature=a/b", "download?file=list.csv"):
            assert len(open_dataset(config("", paths=(f"{url}/{name}",), cache=str(tmp_path / "cache")))) == 1


@pytest.mark.parametrize(
    ("name", "answer", "error"),
    [
        ("a b.tar", b"", "control characters"),
        ("a.tar", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\nabc", "IncompleteRead"),
        ("a.tar", b"garbage\r\n\r\n", "garbage"),
        ("a.tar", b"HTTP/1.1 200 OK\r\n\r\n<html>Please sign in</html>", "the answer is not a tar file"),
        ("a.tar", b"HTTP/1.1 200 OK\r\n\r\n{}", "the answer is not a tar file"),
        ("a.csv", b"HTTP/1.1 200 OK\r\n\r\n\n<!DOCTYPE html>", "the answer is a web page"),
    ],
)
def test_urls_that_answer_with_something_else(tmp_path, name, answer, error):
    """Named in one line, and nothing is kept of it."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def reply():
            connection, _ = server.accept()
            with connection:
                connection.recv(2**16)
                connection.sendall(answer)

        threading.Thread(target=reply, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/{name}"
        with pytest.raises(OSError, match=f"^data: {url} could not be copied to .*: .*{error}") as raised:
            open_dataset(config("", paths=(url,), cache=str(tmp_path / "cache")))
    assert len(str(raised.value).splitlines()) == 1
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock"}


@pytest.mark.parametrize(
    ("cache", "reason"), [("file/cache", "Not a directory"), ("x" * 300, "File name too long")], ids=["below", "long"]
)
def test_a_cache_that_cannot_be_written(shards, tmp_path, cache, reason):  # noqa: F811
    (tmp_path / "file").write_text("")
    url, place = f"file://{shards}/000.tar", tmp_path / cache
    with pytest.raises(OSError, match=rf"^data: {url} could not be copied to {place}: {reason}$"):
        open_dataset(config("", paths=(url,), cache=str(place)))


def test_what_is_no_url_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^data: got http://\[x/0\.tar, which is no URL: Invalid IPv6 URL$"):
        open_dataset(config("", paths=("http://[x/0.tar",), cache=str(tmp_path)))
