"""Which bytes of a store's files are damaged, file by file: what a repair has to make again.

Every byte is read once, for the chunks' XXH3-64 and the file's BLAKE3 together. A file of another
size may still have good chunks; one that cannot be read has none.
"""

from __future__ import annotations

import dataclasses
import os
import stat
from io import BufferedReader

from dsv4.formats.store import digest
from dsv4.formats.store.damage import symbolic_link
from dsv4.formats.store.durable import PIECE_BYTES
from dsv4.formats.store.file_digest import FileDigest
from dsv4.formats.store.manifest import FileRecord
from dsv4.formats.store.reader import PackedStore
from dsv4.formats.store.specs import FileSpec
from dsv4.validate.watch import Progress, Watch

# A pipe in the place of a file is not waited for.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclasses.dataclass(frozen=True)
class FileDamage:
    """A file that is not what the manifest pins. chunks: those whose bytes are lost."""

    file: FileSpec
    problem: str
    chunks: tuple[int, ...]

    def overlaps(self, begin: int, end: int) -> bool:
        """Whether bytes `[begin, end)` of the payload hold anything of a lost chunk."""
        size = self.file.chunk_nbytes
        return any(chunk * size < end and begin < (chunk + 1) * size for chunk in self.chunks)

    @property
    def lost_bytes(self) -> int:
        """Bytes of the lost chunks."""
        return len(self.chunks) * self.file.chunk_nbytes

    @property
    def keeps_some(self) -> bool:
        """Whether the file lies there with bytes that are good."""
        return len(self.chunks) < self.file.chunks


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a regular file to be read. Raises OSError for anything else, links included."""
    descriptor = os.open(path, _READ)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is no regular file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def measure(
    opened: BufferedReader, file: FileSpec, watch: Watch | None = None
) -> tuple[int, FileRecord]:
    """-> (bytes of the payload that are there, record of the file as it is). Raises OSError."""
    watch = watch or Watch()
    checksums = FileDigest(file.chunk_nbytes)
    buffer = memoryview(bytearray(min(PIECE_BYTES, max(file.payload_nbytes, 1))))
    found = 0
    while count := opened.readinto(buffer[: file.payload_nbytes - found]):
        checksums.payload(buffer[:count])
        found += count
        watch.read("examining", count)
    checksums.index(opened.read(file.index_nbytes))
    nbytes = os.fstat(opened.fileno()).st_size
    blake3, xxh3 = checksums.finish()
    return found, FileRecord(nbytes, blake3, file.chunk_nbytes, xxh3)


def survey(store: PackedStore, progress: Progress | None = None) -> list[FileDamage]:
    """What is wrong with the files of a store, each read once. Raises as `examine`."""
    files, watch = store.files_under(None), Watch(progress)
    watch.expect(sum(file.payload_nbytes for file in files))
    return [found for file in files if (found := examine(store, file, watch)) is not None]


def examine(store: PackedStore, file: FileSpec, watch: Watch | None = None) -> FileDamage | None:
    """What is wrong with one file, or None. Raises StoreError for malformed digests."""
    everything = tuple(range(file.chunks))
    if link := symbolic_link(store.root, file.key.rpartition("/")[0], set()):
        return FileDamage(file, f"{link} is a symbolic link", everything)
    try:
        with open_regular(store.root / file.key) as opened:
            payload, found = measure(opened, file, watch)
    except (FileNotFoundError, NotADirectoryError):
        return FileDamage(file, "the file is missing", everything)
    except OSError as error:
        why = "it is no regular file" if error.errno is None else str(error.strerror)
        return FileDamage(file, f"it cannot be read: {why}", everything)
    record = store.records[file.key]
    if found == record:
        return None
    lost = _lost_chunks(store, file, payload, found.xxh3)
    if found.nbytes != record.nbytes:
        problem = f"the file has {found.nbytes} bytes, expected {record.nbytes}"
        return FileDamage(file, problem, lost)
    if lost:
        some = ", ".join(map(str, lost[:8])) + (", ..." if len(lost) > 8 else "")
        return FileDamage(file, f"of {file.chunks} chunks these are altered: {some}", lost)
    if file.sharded and not _has_index(store, file):
        return FileDamage(file, "the sharding index behind the chunks is altered", ())
    return FileDamage(file, "its BLAKE3 is not the manifest's", everything)


def _lost_chunks(store: PackedStore, file: FileSpec, payload: int, xxh3: str) -> tuple[int, ...]:
    """Chunks that are not there whole, or not what the manifest says."""
    count = max(-(-payload // file.chunk_nbytes), 1) if file.chunk_nbytes else 1
    found, expected = digest.decode_digests(xxh3, count), store.chunk_digests(file.key)
    return tuple(i for i in range(file.chunks) if i >= count or found[i] != expected[i])


def _has_index(store: PackedStore, file: FileSpec) -> bool:
    with open_regular(store.root / file.key) as opened:
        opened.seek(file.payload_nbytes)
        return opened.read() == digest.dense_index(file.chunks, file.chunk_nbytes)
