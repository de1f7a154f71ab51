"""Download Tiny Shakespeare (1.1 MB, public domain) to input.txt beside this script, and check its SHA-256.

    python data/prepare.py

Does nothing if the right file is there, and never replaces another text that lies there: it may be yours.
"""
import argparse
import hashlib
import http.client
import sys
import urllib.request
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts lie one folder up
from tokenizer import atomic_write

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SIZE = 1_115_394  # bytes
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
PATH = Path(__file__).resolve().parent / "input.txt"
TIMEOUT = 30  # seconds of silence after which the download is given up
REMEDY = f"Try again, or put any UTF-8 text at {PATH}, or pass --data_path to train.py"


def download():
    """Return the bytes at URL, at most SIZE + 1 of them. Raises OSError or HTTPException when that fails."""
    data = bytearray()
    with (urllib.request.urlopen(URL, timeout=TIMEOUT) as response,
          tqdm(total=SIZE, unit="B", unit_scale=True, desc=PATH.name, disable=None) as bar):
        # one byte too many is enough to know that it is not our file, however long it goes on
        while chunk := response.read(min(65_536, SIZE + 1 - len(data))):
            data += chunk
            bar.update(len(chunk))
    return bytes(data)


def prepare():
    """Make sure that a text lies at PATH, and return a line that says which.

    Raises ValueError if the download fails or brings something else, OSError if PATH cannot be read or written;
    nothing is written then.
    """
    if PATH.exists():
        if hashlib.sha256(PATH.read_bytes()).hexdigest() == SHA256:
            return f"{PATH} is Tiny Shakespeare already"
        return f"{PATH} is another text than Tiny Shakespeare and stays as it is; move it away to download that"
    try:
        data = download()
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"cannot download {URL} ({error}). {REMEDY}") from error
    if len(data) < SIZE:
        raise ValueError(f"{URL} brought only {len(data):,} of {SIZE:,} bytes. {REMEDY}")
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise ValueError(f"{URL} is not Tiny Shakespeare (wrong SHA-256), so it was not kept. {REMEDY}")
    with atomic_write(PATH) as file:
        file.write(data)
    return f"{PATH}: {SIZE:,} bytes, SHA-256 as expected"


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        print(prepare())
    except (ValueError, OSError) as error:
        sys.exit(f"prepare.py: {error}")
    except KeyboardInterrupt:
        sys.exit(f"prepare.py: interrupted, nothing was written. {REMEDY}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a path, whatever the terminal can show
    main()
