"""A run store in memory with two doors: the supervisor's, which can fail, and the nodes'."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from faults.world import World
from trainer.run_store.base import Bytes, StoreError, StoreKeyMissing, checked_key


class MemoryStore:
    """The nodes' door: always there; a node whose network is cut does not come here."""

    uri = "memory://run"

    def __init__(self) -> None:
        self.data: dict[str, list[bytes]] = {}
        self.stale_reads = False

    def read(self, key: str) -> bytes:
        versions = self.data.get(key)
        if not versions:
            raise StoreKeyMissing(key, self.uri)
        return versions[-2] if self.stale_reads and len(versions) > 1 else versions[-1]

    def write(self, key: str, data: bytes) -> None:
        self._put(key, data)

    def create(self, key: str, data: bytes) -> bool:
        if key in self.data:
            return False
        self._put(key, data)
        return True

    def _put(self, key: str, data: bytes) -> None:
        versions = self.data.get(key)
        if versions is None:
            versions = self.data[checked_key(key)] = []
        versions.append(data)
        del versions[:-3]

    def list(self, prefix: str = "") -> list[str]:
        return sorted(key for key in self.data if key.startswith(prefix))

    def delete(self, key: str) -> None:
        self.data.pop(key, None)

    def deliver_again(self, prefix: str) -> None:
        """Messages under that prefix arrive a second time, late: what came before the newest comes after it."""
        for versions in [held for key, held in self.data.items() if key.startswith(prefix)]:
            versions.append(versions[0])

    def read_range(self, key: str, offset: int, num_bytes: int) -> bytes:
        return self.read(key)[offset : offset + num_bytes]

    def write_pieces(self, key: str, pieces: Sequence[Bytes]) -> None:
        self.write(key, b"".join(pieces))

    def upload(self, key: str, source: Path) -> None:
        self.write(key, source.read_bytes())

    def download(self, key: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(self.read(key))


class SupervisorsDoor(MemoryStore):
    """The same data over a connection that takes time, may be cut, and may lose what was written."""

    def __init__(self, behind: MemoryStore, world: World) -> None:
        super().__init__()
        self.data = behind.data
        self.world = world
        self.down = 0
        self.losing_writes = 0
        self.losing_replies = 0

    def _reach(self, action: str, key: str) -> None:
        if self.down:
            self.world.call(1.0)
            raise StoreError(f"cannot {action} {key}: the store does not answer; run the command again.")

    def read(self, key: str) -> bytes:
        self._reach("read", key)
        return super().read(key)

    def write(self, key: str, data: bytes) -> None:
        name = key.split("/")[0]
        self.world.boundary(f"{name}:before")
        self._reach("write", key)
        self.world.call()
        if not self.losing_writes:
            super().write(key, data)
        self.world.boundary(f"{name}:after")

    def create(self, key: str, data: bytes) -> bool:
        """Records of the ledger are conditional writes."""
        name = key.split("/")[0]
        self.world.boundary(f"{name}:before")
        self._reach("create", key)
        self.world.call()
        created = True if self.losing_writes else super().create(key, data)
        self.world.boundary(f"{name}:after")
        if self.losing_replies:
            raise StoreError(f"cannot create {key}: the reply was lost; run the command again.")
        return created

    def list(self, prefix: str = "") -> list[str]:
        self._reach("list", prefix)
        return super().list(prefix)
