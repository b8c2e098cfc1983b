"""Makes the text that calibration uses where no data is named, from Debian's documentation of Python 3.11.

apt-get download python3.11-doc=3.11.2-6+deb12u8
python -m tests.docs.builtin_text python3.11-doc_3.11.2-6+deb12u8_all.deb

Pages are cut at blank lines into documents of some thousand characters, and stand in an order that mixes them, so that
a beginning of the file is a sample of it. The licence is the package's copyright file.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from quarkcli.forward import defaults

SHA256 = "50eb63e7f636c4281e9ce1b8f10386f1def42159eddce34fc1f41c46261df71b"
PAGES = "./usr/share/doc/python3.11/html/_sources/"
LICENCE = "./usr/share/doc/python3.11-doc/copyright"
WHOLE = ("tutorial/", "howto/", "faq/", "reference/")
LIBRARY, SHARE = "library/", 4  # of the library, one page in so many
LEAST = 4000  # characters of a document
ROLE = re.compile(r":(?:\w+:)?\w+:`[~!]?([^`]+)`")


def main(package: str) -> None:
    data = Path(package).read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        sys.exit(f"{package}: sha256 {found}, not {SHA256}")
    tar = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], capture_output=True, check=True).stdout
    documents, licence = [], b""
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        for member in archive:
            name = member.name.removeprefix(PAGES).removesuffix(".rst.txt")
            if member.name == LICENCE:
                licence = _read(archive, member)
            elif member.isfile() and member.name.startswith(PAGES) and _is_taken(name):
                documents += list(cut(name, _read(archive, member).decode()))
    documents.sort(key=lambda row: hashlib.sha256(json.dumps(row).encode()).digest())
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in documents)
    defaults.FILE.parent.mkdir(exist_ok=True)
    defaults.FILE.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    defaults.FILE.with_name("LICENSE.txt").write_bytes(licence)
    print(f"{len(documents)} documents, {len(text):,} bytes, sha256 {hashlib.sha256(text.encode()).hexdigest()}")


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None
    return file.read()


def _is_taken(name: str) -> bool:
    """Returns whether a page is used: of the library, a share by the digest of the name."""
    return name.startswith(WHOLE) or (name.startswith(LIBRARY) and _digest(name) % SHARE == 0)


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def cut(page: str, text: str) -> Iterator[dict[str, str]]:
    """Yields the documents of a page. Roles of reStructuredText are left out: `:func:`len`` is `len`."""
    lines: list[str] = []
    size = 0
    for line in ROLE.sub(r"`\1`", text).splitlines():
        lines.append(line.rstrip())
        size += len(line) + 1
        if not line.strip() and size >= LEAST:
            yield {"page": page, "text": "\n".join(lines).strip() + "\n"}
            lines, size = [], 0
    if size:
        yield {"page": page, "text": "\n".join(lines).strip() + "\n"}


if __name__ == "__main__":
    main(sys.argv[1])
