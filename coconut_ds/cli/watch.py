"""Serve a page about runs that refreshes itself: loss, accuracy by stage, memory, throughput.

    python -m coconut_ds watch RUN [RUN ...]

The page is that of `report`, read-only, on this machine's own address; it also works for a finished run.
From another machine: ssh -L 8765:127.0.0.1:8765 HOST, then open the address there.
"""

import argparse
import errno
import threading
import time
from collections.abc import Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from coconut_ds.errors import ConfigError, UserError

ADDRESS, PORT = "127.0.0.1", 8765
REFRESH_SECONDS = 15


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or folders that hold runs")
    parser.add_argument(
        "--port", type=int, metavar="N", help=f"port of the page (default: {PORT}, or a free one)"
    )


def run(args: argparse.Namespace) -> int:
    from coconut_ds.reports.run_records import run_folders  # imports torch

    pages = Pages([folder for path in args.runs for folder in run_folders(path) or [Path(path)]])
    with open_server(pages, args.port) as server:
        pages.html()  # now, so that the page opens at once
        print(f"http://{ADDRESS}:{server.server_port}/  (Ctrl-C ends it)", flush=True)
        server.serve_forever()
    return 0


def open_server(pages: "Pages", port: int | None) -> ThreadingHTTPServer:
    """A server of the page.  Raises ConfigError if `port` cannot be used."""
    handler = partial(Handler, pages)
    for number in (PORT, 0) if port is None else (port,):
        try:
            return ThreadingHTTPServer((ADDRESS, number), handler)
        except (OSError, OverflowError) as error:
            if port is not None or getattr(error, "errno", None) != errno.EADDRINUSE:
                raise ConfigError(f"--port {number}: {error}; write another number") from error
    raise AssertionError("port 0 is never in use")


class Pages:
    """The page of some runs, made again when their metrics have changed."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders
        self._lock = threading.Lock()  # matplotlib draws in one thread at a time
        self._made: tuple[Any, bytes] | None = None

    def html(self) -> bytes:
        """Raises UserError while a run folder cannot be read."""
        from coconut_ds.reports.figures import svg_url  # importing matplotlib takes a second
        from coconut_ds.reports.run_page import page_text
        from coconut_ds.reports.run_records import read_run
        from coconut_ds.runs.run_folder import METRICS, is_running

        with self._lock:
            running = [is_running(folder) for folder in self.folders]
            state = running, [file.stat().st_size for f in self.folders if (file := f / METRICS).exists()]
            if self._made is None or self._made[0] != state:
                subtitle = f"{sum(running)} running, read at {time.strftime('%H:%M:%S')}"
                runs = [read_run(folder) for folder in self.folders]
                text = page_text(runs, lambda _, figure: svg_url(figure), subtitle, REFRESH_SECONDS)
                self._made = state, text.encode("utf-8", errors="backslashreplace")
            return self._made[1]


class Handler(BaseHTTPRequestHandler):
    """Answers GET / and nothing else."""

    def __init__(self, pages: Pages, *args: Any) -> None:
        self.pages = pages
        super().__init__(*args)

    def do_GET(self) -> None:
        # A page of another site whose name points here must not read this one.
        if self.headers.get("Host", "").rpartition(":")[0] not in (ADDRESS, "localhost"):
            return self.send_error(403)
        if self.path != "/":
            return self.send_error(404)
        try:
            code, body = 200, self.pages.html()
        except UserError as error:
            code, body = 503, str(error).encode("utf-8", errors="backslashreplace")
        self.send_response(code)
        self.send_header("Content-Type", f"text/{'html' if code == 200 else 'plain'}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)
        return None

    def log_message(self, *_: Any) -> None:
        """Print no line per request."""
