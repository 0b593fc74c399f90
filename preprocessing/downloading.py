"""Fetch a file once: resumed where it stopped, checked by its digest, and never half there.

Knows: HTTP and digests.  Does not know: what is in a file.
"""

import hashlib
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from coconut_ds.errors import DataError

_TIMEOUT_SECONDS = 30
_ATTEMPTS = 3
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Download:
    """A file to fetch; without a known digest, one that the hub sends with the file is used."""

    url: str
    sha256: str | None = None


def fetch(download: Download, target: Path) -> Path:
    """The file at `target`, downloaded when it is not there; a file that is there is only checked.

    The bytes go to `target`.part, which a later call continues.  Raises DataError, which names the file
    to fetch by hand and its place, when the server cannot be reached or sends something else.
    """
    if target.exists():
        if download.sha256 and (found := file_digest(target)) != download.sha256:
            raise DataError(
                f"{target}: its sha256 is {found}, not {download.sha256}; delete it to download it again"
            )
        return target
    new_folders = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    promised = None
    for attempt in range(_ATTEMPTS):
        try:
            promised = _receive(download.url, part, target.name)
            break
        except (OSError, HTTPException) as error:
            final = attempt + 1 == _ATTEMPTS or _is_final(error)
            if final:
                _forget_if_empty(part, new_folders)
                raise DataError(_by_hand(download, target, part, error)) from None
            time.sleep(2**attempt)
    wanted = download.sha256 or promised
    if wanted and (found := file_digest(part)) != wanted:
        part.unlink()
        raise DataError(
            f"{download.url}: the file received has sha256 {found}, not {wanted}, and was deleted; "
            f"try again, or get it elsewhere and put it at {target}"
        )
    os.replace(part, target)
    return target


def file_digest(path: Path) -> str:
    """The sha256 of a file, as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _receive(url: str, part: Path, name: str) -> str | None:
    """Append what is missing to `part`; returns the sha256 that the server promises, if it does."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "coconut-ds", **({"Range": f"bytes={have}-"} if have else {})}
    redirects = _Redirects()
    opener = urllib.request.build_opener(redirects)
    try:
        response = opener.open(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left to send: the part is whole, or wrong, as the digest will tell
            return None
        raise
    with response:
        resumed = have and response.status == 206
        length = response.headers.get("Content-Length")
        total = int(length) + (have if resumed else 0) if length else None
        with (
            part.open("ab" if resumed else "wb") as file,
            tqdm(
                desc=name,
                total=total,
                initial=have if resumed else 0,
                unit="B",
                unit_scale=True,
                disable=None,
            ) as bar,
        ):
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and part.stat().st_size < total:
        raise ConnectionError(f"the connection ended after {part.stat().st_size} of {total} bytes")
    return redirects.promised


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects and keeps the sha256 that the Hugging Face hub states before it redirects."""

    promised: str | None = None

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        etag = (headers.get("X-Linked-ETag") or "").strip('"')
        if len(etag) == 64:
            self.promised = etag
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _is_final(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code < 500 and error.code != 429
    reason = getattr(error, "reason", None)
    return isinstance(reason, OSError) and not isinstance(reason, TimeoutError | ConnectionResetError)


def _forget_if_empty(part: Path, new_folders: list[Path]) -> None:
    if part.exists() and part.stat().st_size == 0:
        part.unlink()
    for folder in new_folders:  # the innermost first
        if not any(folder.iterdir()):
            folder.rmdir()


def _by_hand(download: Download, target: Path, part: Path, error: Exception) -> str:
    kept = (
        f"\n  ({part} keeps what has arrived; running this again goes on from there.)"
        if part.exists()
        else ""
    )
    digest = f"\n  Its sha256 is {download.sha256}." if download.sha256 else ""
    return (
        f"{target.name} cannot be downloaded: {getattr(error, 'reason', None) or error}\n"
        f"  Without network: on another machine fetch {download.url}\n"
        f"  put it at {target} and run this again.{digest}{kept}"
    )
