"""Downloads Tiny Shakespeare (1.1 MB, public domain) to input.txt beside this script.

    python data/prepare.py

Does nothing if the text is there already, and never replaces another that lies there: it may be
yours. Where one source is blocked or brings another SHA-256, a second one is asked.
"""
import argparse
import hashlib
import http.client
import sys
import urllib.request
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts lie one folder up
from tokenizer import atomic_write, run_script

URLS = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt")
SIZE = 1_115_394  # bytes
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
PATH = Path(__file__).resolve().parent / "input.txt"
TIMEOUT = 30  # seconds of silence after which a source is given up
REMEDY = f"Try again, or put any UTF-8 text at {PATH}, or pass --data_path to train.py"


def download(url: str) -> bytes:
    """Returns the text. Raises ValueError if it is another, OSError or HTTPException if none."""
    data = bytearray()
    with (urllib.request.urlopen(url, timeout=TIMEOUT) as response,
          tqdm(total=SIZE, unit="B", unit_scale=True, desc=PATH.name, disable=None) as bar):
        # one byte too many tells that it is another text
        while chunk := response.read(min(65_536, SIZE + 1 - len(data))):
            data += chunk
            bar.update(len(chunk))
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise ValueError(f"{len(data):,} bytes with the wrong SHA-256, not {SIZE:,}")
    return bytes(data)


def prepare() -> str:
    """Makes sure that a text lies at PATH, and returns a line that says which.

    Raises ValueError if no source brings it, OSError if PATH cannot be read or written; nothing is
    written then.
    """
    if PATH.exists():
        if hashlib.sha256(PATH.read_bytes()).hexdigest() == SHA256:
            return f"{PATH} is Tiny Shakespeare already"
        return (f"{PATH} is another text than Tiny Shakespeare and stays as it is; "
                "move it away to download that")
    failures = []
    for url in URLS:
        try:
            data = download(url)
        except (OSError, ValueError, http.client.HTTPException) as error:
            failures.append(f"{url} ({error})")
            continue
        with atomic_write(PATH) as file:
            file.write(data)
        return f"{PATH}: {SIZE:,} bytes, SHA-256 as expected"
    raise ValueError(f"cannot download Tiny Shakespeare from {' or '.join(failures)}. {REMEDY}")


def main() -> None:
    argparse.ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(prepare())


if __name__ == "__main__":
    run_script(main)
