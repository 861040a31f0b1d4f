"""Images at an address: `http(s)://...` is fetched, a data URI is decoded; what comes is checked by whoever opens it.

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
    """Whether a text is an address, of whatever kind, and not the path of a file."""
    return ADDRESS.match(text) is not None


def shown(text: str) -> str:
    """An address without what may be secret: user and password, the query, the fragment, and a data URI's data.

    Other texts are shown as they are.
    """
    if text[:5].lower() == "data:":
        return "data:" + re.split(r"[;,]", text[5:105], maxsplit=1)[0]
    address = re.match(r"([a-z][a-z0-9+.-]*:/+)(?:[^/?#]*@)?([^?#]*)", text, re.IGNORECASE)
    return address[1] + address[2] if address else text


def fetch(address: str, name: str = "image") -> bytes:
    """What lies at an address, as it is.

    address: `http://` or `https://`, whose redirects are followed to addresses of these two kinds, or a data URI.
    name: what messages call it. At most 64 MiB are taken, within 60 seconds.

    Raises, each in one line, ValueError for an address of another kind or one that is broken, and for what is too
    large; FileNotFoundError where the server knows nothing of it; TimeoutError; ConnectionError where no server
    answers or the transfer breaks off; OSError for what else a server answers.
    """
    name = f"{name} {shown(address)!r}"
    if address[:5].lower() == "data:":
        return _decode(address, name)
    if not address.lower().startswith(("http://", "https://")):
        raise ValueError(f"{name}: want an address of http or https, a data URI, or the path of a file")
    return _download(address, name)


def _decode(address: str, name: str) -> bytes:
    """Source: RFC 2397; base64 as browsers forgive it, with white space and without padding."""
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
            raise ValueError(f"{name}: its base64 is broken: {error}") from error
    return content


def _download(address: str, name: str) -> bytes:
    """In a thread with a loop of its own: only there the whole of a transfer has a time limit, drip by drip."""
    import anyio.from_thread
    import httpx2

    try:
        with anyio.from_thread.start_blocking_portal() as portal:
            return portal.call(_transfer, address, name)
    except (TimeoutError, httpx2.TimeoutException) as error:
        raise TimeoutError(f"{name}: did not come within {LONGEST:g} seconds") from error
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
        raise ValueError(f"{name}: not an address of http or https, or redirected to none: {_line(error)}") from error
    except httpx2.TooManyRedirects as error:
        raise OSError(f"{name}: redirected more than {REDIRECTS} times") from error
    except httpx2.HTTPError as error:
        raise ConnectionError(f"{name}: cannot be fetched: {_line(error)}") from error


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
                    raise ValueError(f"{name}: is larger than {LARGEST / 2**20:g} MiB, the most that is fetched")
            return bytes(content)


def _line(error: BaseException) -> str:
    """What went wrong, without the queries of addresses in it."""
    return re.sub(r"\?\S*", "?...", " ".join(str(error).split())) or type(error).__name__
