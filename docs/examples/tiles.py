"""Thousands of pictures in little memory: a `PurgeableCache` of decoded pictures that yields under memory pressure.

A map viewer stores its tiles compressed and displays them decoded. Decoding takes a millisecond, so every decoded
tile is worth keeping until the memory is needed for something else. With a `dict` the programmer must choose how much
to keep; if it is too much, the program is killed. With a `PurgeableCache` the kernel reclaims the tiles that have not
been displayed for longest.

    python tiles.py                 # 1 GiB of decoded tiles, under any memory limit
    python tiles.py --plain         # the same with a dict, to see what happens under a limit

Under a limit, for example: systemd-run --user --scope -p MemoryMax=256M -p MemorySwapMax=0 python tiles.py
"""

import argparse
import random
import time
import zlib

import iobmd

SIDE = 512  # pixels, of four bytes


class Atlas:
    """The compressed tiles, as stored on disk."""

    def __init__(self, tiles: int) -> None:
        self.tiles = tiles
        self._files = [zlib.compress(self._paint(number), 1) for number in range(64)]

    @staticmethod
    def _paint(number: int) -> bytes:
        row = bytes(number * column % 251 for column in range(1, SIDE * 4 + 1))
        return row * SIDE

    def decode(self, number: int) -> memoryview:
        """Return the pixels of a tile: rows, columns, and red, green, blue, alpha."""
        return memoryview(zlib.decompress(self._files[number % 64])).cast("B", (SIDE, SIDE, 4))


class Plain:
    """The usual cache: a dict without a limit."""

    def __init__(self, loader):
        self._loader = loader
        self._kept = {}
        self.hits = 0

    def __getitem__(self, key):
        if key in self._kept:
            self.hits += 1
        else:
            self._kept[key] = self._loader(key)
        return self._kept[key]


def show(cache, number: int) -> int:
    """Display a tile, which cannot be reclaimed during that time."""
    pixels = memoryview(cache[number])
    return zlib.adler32(pixels)


def main() -> None:
    """Display tiles, some more often than others, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiles", type=int, default=1024, help="number of tiles of 1 MiB (default: 1024)")
    parser.add_argument("--shows", type=int, default=5000, help="number of times a tile is displayed (default: 5000)")
    parser.add_argument("--plain", action="store_true", help="keep them in a dict instead")
    arguments = parser.parse_args()

    atlas = Atlas(arguments.tiles)
    expected = [zlib.adler32(atlas.decode(number)) for number in range(64)]
    chance = random.Random(1)
    cache = Plain(atlas.decode) if arguments.plain else iobmd.PurgeableCache(atlas.decode)
    begin = time.perf_counter()
    for _ in range(arguments.shows):
        number = int(atlas.tiles * chance.random() ** 2)
        if show(cache, number) != expected[number % 64]:
            raise SystemExit(f"tile {number} is wrong")
    seconds = time.perf_counter() - begin
    if arguments.plain:
        print(f"{arguments.shows} tiles correct in {seconds:.1f} s, {cache.hits} of them cached")
        return
    found = cache.statistics
    print(f"{arguments.shows} tiles correct in {seconds:.1f} s, {found.hits} of them cached")
    print(f"{found.loaded} decoded once, {found.rebuilt} again after the system had reclaimed them")
    cache.close()


if __name__ == "__main__":
    main()
