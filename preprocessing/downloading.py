"""Fetch a file once: resumed where it stopped, checked by its digest, and in place only when complete."""

import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import get_hf_file_metadata
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get

from coconut_ds.errors import DataError, first_line
from coconut_ds.files import hash_file

HUB = "https://huggingface.co/"
SHA256_LETTERS = 64


@dataclass(frozen=True)
class Download:
    """A file to fetch; without a known digest, the one that the hub states for it is used."""

    url: str
    sha256: str | None = None


def fetch(download: Download, target: Path) -> Path:
    """The file at `target`, downloaded when it is not there; a file that is there is only checked.

    The bytes go to `target`.part, which a later call continues.  Raises DataError, which names the file
    to fetch by hand and its place, when the server cannot be reached or sends something else.
    """
    if target.exists():
        if download.sha256 and (digest := hash_file(target)) != download.sha256:
            raise DataError(
                f"{target}: its sha256 is {digest}, not {download.sha256}; delete it to download it again"
            )
        return target
    new_folders = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    try:
        expected = download.sha256 or _digest_on_hub(download.url)
        _receive(download.url, part, target.name)
    except Exception as error:  # of the network, the server or the disk; httpx2 raises many kinds
        _remove_if_empty(part, new_folders)
        raise DataError(_by_hand(download, target, part, error)) from None
    if expected and (digest := hash_file(part)) != expected:
        part.unlink()
        raise DataError(
            f"{download.url}: the file received has sha256 {digest}, not {expected}, and was deleted; "
            f"try again, or get it elsewhere and put it at {target}"
        )
    os.replace(part, target)
    return target


def _digest_on_hub(url: str) -> str | None:
    etag = get_hf_file_metadata(url).etag if url.startswith(HUB) else None
    return etag if etag and len(etag) == SHA256_LETTERS else None


def _receive(url: str, part: Path, name: str) -> None:
    """Append what is missing to `part`."""
    with part.open("ab") as file:
        try:
            http_get(
                url,
                file,
                resume_size=file.tell(),
                headers={"Accept-Encoding": "identity"},  # a compressed answer cannot be continued
                displayed_filename=name,
            )
        except HfHubHTTPError as error:
            if error.response.status_code != 416:  # nothing is left: complete, or the digest differs
                raise
        file.flush()
        os.fsync(file.fileno())


def _remove_if_empty(part: Path, new_folders: list[Path]) -> None:
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
        f"{target.name} cannot be downloaded: {first_line(error)}\n"
        f"  Without network: on another machine fetch {download.url}\n"
        f"  put it at {target} and run this again.{digest}{kept}"
    )
