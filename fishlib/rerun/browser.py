"""A Chromium without a window, driven by Playwright: it prints the book, and the tests read the site in it."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# It talks to nobody on its own account: without these it looks its makers' hosts up at every start.
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage")

ALONE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"


def find() -> str | None:
    """The path of a Chromium that is installed, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def browser(offline: bool = False) -> Iterator[Browser]:
    """A Chromium of its own, with an empty profile, that ends with the block.

    Parameters
    ----------
    offline : reach nothing but this machine

    Raises
    ------
    ValueError
        no Chromium or no Playwright is installed
    """
    path = find()
    if path is None:
        raise ValueError(f"no browser is installed: install Chromium (one of {', '.join(NAMES)} on the PATH)")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise ValueError("Playwright is not installed: pip install 'fishlib[browser]'") from error
    with sync_playwright() as playwright, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = [*FLAGS, ALONE] if offline else list(FLAGS)
        chromium = playwright.chromium.launch(executable_path=path, args=flags, env={"HOME": profile})
        try:
            yield chromium
        finally:
            chromium.close()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server of `folder` on this machine, which ends with the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *words: Any) -> None:
        """Say nothing."""
