"""Finds folders that hold git-LFS pointers or files of another format instead of a model."""

from __future__ import annotations

from pathlib import Path

from quarkcli.errors import ModelError

_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_LIMIT = 1024  # bytes; pointers are about 130
_NOT_TAKEN = (".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")


def check_folder(folder: Path) -> None:
    """Raises ModelError for pointers in the place of files that are read or copied, and for a folder of GGUF files."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    pointers = [name for name in names if not name.endswith(_NOT_TAKEN) and _is_pointer(folder / name)]
    if pointers:
        more = f" and {len(pointers) - 4} more" if len(pointers) > 4 else ""
        raise ModelError(
            f"holds git-LFS pointers instead of the files: {', '.join(pointers[:4])}{more}",
            where=str(folder),
            hint="run 'git lfs pull' in that folder to download the files",
            kind="E-MODEL-LFS",
        )
    ggufs = [name for name in names if name.endswith(".gguf")]
    if ggufs and not any(name.endswith(".safetensors") for name in names):
        raise ModelError(
            f"holds no .safetensors files, only {', '.join(ggufs[:4])}",
            where=str(folder),
            hint="give the Hugging Face model it was made from; GGUF is another format, mostly quantized already",
            kind="E-MODEL-FILES",
        )


def _is_pointer(path: Path) -> bool:
    try:
        if path.stat().st_size > _POINTER_LIMIT:
            return False
        with path.open("rb") as stream:
            return stream.read(len(_POINTER)) == _POINTER
    except OSError:  # who reads the file says why it cannot be read
        return False
