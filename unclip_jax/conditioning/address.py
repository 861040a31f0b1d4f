"""Images at an address: `http(s)://...` is downloaded, a data URI is decoded; whoever opens the bytes checks them.

An address may hold a secret, a signature or a password: messages and recipes show it through `shown`.
"""

import base64
import binascii
import re
from urllib.parse import unquote_to_bytes

from unclip_jax import __version__

ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)
LARGEST = 64 * 2**20  # bytes
LONGEST = 60.0  # seconds, for all of it
REDIRECTS = 5
HEADERS = {"User-Agent": f"unclip_jax/{__version__}", "Accept": "image/*, */*;q=0.5", "Accept-Encoding": "identity"}


def is_address(text: str) -> bool:
    """Whether a text is an address of any kind, rather than the path of a file."""
    return ADDRESS.match(text) is not None


def shown(text: str) -> str:
    """An address without what may be secret: user and password, query, fragment, and the data of a data URI.

    Other texts are returned as they are.
    """
    if text[:5].lower() == "data:":
        return "data:" + re.split(r"[;,]", text[5:105], maxsplit=1)[0]
    address = re.match(r"([a-z][a-z0-9+.-]*:/+)(?:[^/?#]*@)?([^?#]*)", text, re.IGNORECASE)
    return address[1] + address[2] if address else text


def fetch(address: str, name: str = "image") -> bytes:
    """Downloads an address.

    At most 64 MiB are read, within 60 seconds.

    Args:
        address: `http://` or `https://`, whose redirects are followed to addresses of these two kinds, or a data URI.
        name: What error messages call it.

    Returns:
        The bytes as they are.

    Raises:
        ValueError: The address is broken or of another kind, or the data is too large.
        FileNotFoundError: The server does not have it.
        TimeoutError: The transfer takes too long.
        ConnectionError: No server answers, or the transfer breaks off.
        OSError: The server answers with another error.
    """
    name = f"{name} {shown(address)!r}"
    if address[:5].lower() == "data:":
        return _decode(address, name)
    if not address.lower().startswith(("http://", "https://")):
        raise ValueError(f"{name}: unknown kind of address; want http, https, a data URI, or the path of a file")
    return _download(address, name)


def _decode(address: str, name: str) -> bytes:
    """Decodes a data URI (RFC 2397), with base64 as lenient as browsers: with white space and without padding."""
    kind, comma, data = address[5:].partition(",")
    if not comma:
        raise ValueError(f"{name}: a data URI without a comma before its data")
    if len(data) > 2 * LARGEST:
        raise ValueError(f"{name}: a data URI of {len(data)} characters; want at most {2 * LARGEST}")
    content = unquote_to_bytes(data)
    if kind.lower().rstrip().endswith(";base64"):
        content = b"".join(content.split()).rstrip(b"=")
        try:
            content = base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)
        except binascii.Error as error:
            raise ValueError(f"{name}: broken base64: {error}") from error
    return content


def _download(address: str, name: str) -> bytes:
    """Downloads in a thread with an event loop of its own: only so can a whole transfer have a time limit."""
    import anyio.from_thread
    import httpx2

    try:
        with anyio.from_thread.start_blocking_portal() as portal:
            return portal.call(_transfer, address, name)
    except (TimeoutError, httpx2.TimeoutException) as error:
        raise TimeoutError(f"{name}: did not arrive within {LONGEST:g} seconds") from error
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
        raise ValueError(f"{name}: not an address of http or https, or redirected elsewhere: {_line(error)}") from error
    except httpx2.TooManyRedirects as error:
        raise OSError(f"{name}: redirected more than {REDIRECTS} times") from error
    except httpx2.HTTPError as error:
        raise ConnectionError(f"{name}: cannot be downloaded: {_line(error)}") from error


async def _transfer(address: str, name: str) -> bytes:
    import anyio
    import httpx2

    client = httpx2.AsyncClient(headers=HEADERS, follow_redirects=True, max_redirects=REDIRECTS, timeout=LONGEST)
    with anyio.fail_after(LONGEST):
        async with client, client.stream("GET", address) as response:
            if not response.is_success:
                kind = FileNotFoundError if response.status_code in (404, 410) else OSError
                raise kind(f"{name}: the server answers {response.status_code} {response.reason_phrase}")
            content = bytearray()
            async for part in response.aiter_bytes():
                content += part
                if len(content) > LARGEST:
                    raise ValueError(f"{name}: is larger than {LARGEST / 2**20:g} MiB, the largest that is downloaded")
            return bytes(content)


def _line(error: BaseException) -> str:
    """What went wrong, without the queries of the addresses in it."""
    return re.sub(r"\?\S*", "?...", " ".join(str(error).split())) or type(error).__name__
