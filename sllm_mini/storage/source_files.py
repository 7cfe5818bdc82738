"""Remote folders through `fsspec`: which file system an address names, and reading those that have no HTTP address.

Whatever can be named by an HTTP address (http itself, s3 and gs by signing one, hf) is read by `source_http`, which is
why s3 and hf are as fast as http. Taught in chapter 03.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from json import JSONDecodeError
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from sllm_mini.errors import LoadCancelled, RemoteError, UnsupportedError
from sllm_mini.storage.source import Differs, Interrupted, RemoteOptions, Source, reason_of, refusal, shown, unreached
from sllm_mini.storage.source_http import HttpSource

_PIECE_NBYTES = 4 << 20
_SIGNED_SECONDS = 3600


class FileSystemSource:
    """Files of any other `fsspec` file system."""

    def __init__(self, url: str, files: Any, root: str) -> None:
        self.url = shown(url)
        self.reached = False
        self._files, self._root = files, root.rstrip("/")

    def nbytes(self, file: str, *, ranged: bool = False) -> int:
        with _Translated(self, file):
            found = self._files.info(f"{self._root}/{file}")
            if found["type"] != "file" or found["size"] is None:
                raise Differs("it is not a file whose size is known")
            return int(found["size"])

    def stream(self, file: str, offset: int, view: memoryview, total_nbytes: int) -> Iterator[int]:
        path = f"{self._root}/{file}"
        if getattr(self._files, "local_file", False):
            with _Translated(self, file), self._files.open(path, "rb") as opened:
                opened.seek(offset)
                yield from self._pieces(view, opened.readinto)
        else:
            with _Translated(self, file):
                at = offset

                def piece(into: memoryview) -> int:
                    nonlocal at
                    found = self._files.cat_file(path, start=at, end=at + len(into))
                    if len(found) > len(into):
                        raise RemoteError("its file system ignores ranges; copy it to one that supports them", path=f"{self.url}/{file}", offset=at)
                    into[: len(found)] = found
                    at += len(found)
                    return len(found)

                yield from self._pieces(view, piece)

    def close(self) -> None:
        """The file system belongs to fsspec."""

    def _pieces(self, view: memoryview, read: Callable[[memoryview], int]) -> Iterator[int]:
        at = 0
        while at < len(view):
            count = read(view[at : at + _PIECE_NBYTES])
            if count == 0:
                raise Differs("it ends before this byte")
            at += count
            yield count


class _Translated:
    """Turns what a file system raises into the exceptions of this module. Messages of others may show secrets."""

    def __init__(self, source: FileSystemSource, file: str) -> None:
        self._source, self._place = source, f"{source.url}/{file}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self._source.reached = True
        if isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)):
            raise Differs("there is no such file") from None
        if isinstance(error, PermissionError):
            raise RemoteError("it may not be read; check the credentials", path=self._place) from None
        if isinstance(error, Exception) and not isinstance(error, (Differs, RemoteError, LoadCancelled, Interrupted)):
            found = None if self._source.reached else unreached(error, "its server")
            if found is not None:
                raise found from None
            raise Interrupted(reason_of(error)) from None


def open_source(url: str, options: RemoteOptions) -> Source:
    """The source for an address. Raises UnsupportedError if no file system is installed for it, RemoteError if it
    cannot be set up."""
    import urllib3

    try:
        scheme = urlsplit(url).scheme
    except ValueError as error:
        raise refusal(f"{shown(url)} is not an address ({error}); write for example https://HOST/FOLDER", shown(url)) from None
    if scheme in ("http", "https"):
        parts = urlsplit(url)
        user, _, host = parts.netloc.rpartition("@")
        headers = dict(options.storage.get("headers", {}))
        if user:
            headers |= urllib3.make_headers(basic_auth=unquote(user))
        root = parts.path.rstrip("/")
        return HttpSource(url, lambda file: urlunsplit((scheme, host, f"{root}/{quote(file)}", parts.query, "")), headers, options)
    import fsspec

    try:
        files, root = fsspec.core.url_to_fs(url, **options.storage)
    except ImportError:
        raise UnsupportedError(f"{shown(url)} needs a file system that is not installed; install sllm_mini[remote], or the one that fsspec names for {scheme}://") from None
    except Exception as error:  # noqa: BLE001 - each file system has its own
        if str(error).startswith("Protocol not known"):
            raise UnsupportedError(f"{shown(url)} is not an address: no file system reads {scheme}://; write https://…, s3://… or hf://OWNER/NAME") from None
        raise RemoteError(f"its file system cannot be set up ({reason_of(error)}); check the address and the credentials", path=shown(url)) from None
    if scheme == "hf":
        return _hub_source(url, files, options)
    if scheme in ("s3", "s3a", "gs", "gcs") and _signs(files, root):
        return HttpSource(url, lambda file: str(files.sign(f"{root.rstrip('/')}/{file}", expiration=_SIGNED_SECONDS)), {}, options)
    return FileSystemSource(url, files, root)


def _signs(files: Any, root: str) -> bool:
    try:
        return str(files.sign(f"{root.rstrip('/')}/index.json", expiration=_SIGNED_SECONDS)).startswith("http")
    except Exception:  # noqa: BLE001 - without credentials that can sign, fsspec reads it all the same
        return False


def _hub_source(url: str, files: Any, options: RemoteOptions) -> Source:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    source = FileSystemSource(url, files, files._strip_protocol(url))
    with _Translated(source, ""):
        try:
            found = files.resolve_path(url)
        except (ValueError, NotImplementedError) as error:
            if isinstance(error, (OSError, JSONDecodeError, UnicodeDecodeError)):  # of an answer, not of the address
                raise
            raise refusal(f"{source.url} is not an address; write hf://OWNER/NAME", source.url) from None
        except FileNotFoundError:
            raise RemoteError("the hub knows no such repository or revision, or these credentials may not see it", path=source.url) from None
        if not hasattr(found, "repo_id"):
            return source  # a bucket
        folder = f"{found.path_in_repo.rstrip('/')}/".lstrip("/")
        headers = build_hf_headers(token=files.token)

        def address(file: str) -> str:
            return hf_hub_url(found.repo_id, folder + file, repo_type=found.repo_type, revision=found.revision, endpoint=files.endpoint)

        return HttpSource(url, address, headers, options)
