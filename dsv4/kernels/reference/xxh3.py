"""XXH3-64 of whole KiB, as the xxHash specification has it, in integers of torch.

    stripe   64 bytes, eight words d[i]; stripe n of a block meets the secret's words k = n to n + 7
    block    16 stripes, of each acc[i ^ 1] += d[i] and acc[i] += low32(d[i] ^ k) * high32(d[i] ^ k)
    between  acc = ((acc ^ acc >> 47) ^ secret[16 + i]) * PRIME32_1
    at last  the last stripe meets the secret's bytes from 121 on; then acc is folded

Within a block the sums may be taken in any order; only the step between blocks is a chain. So a
kernel computes what is called accumulators here, and the fold to 64 bits is done for all chunks at
once. Chunks of another length than a multiple of 1024 are hashed by the xxhash library.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_BYTES = 1024
STRIPES = 16
LANES = 8
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_PRIME32_1, _PRIME32_2, _PRIME32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
_PRIME64_1, _PRIME64_2, _PRIME64_3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_PRIME64_4, _PRIME64_5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
INITIAL = (
    _PRIME32_3,
    _PRIME64_1,
    _PRIME64_2,
    _PRIME64_3,
    _PRIME64_4,
    _PRIME32_2,
    _PRIME64_5,
    _PRIME32_1,
)
SCRAMBLE_PRIME = _PRIME32_1
_AVALANCHE = 0x165667919E3779F9
_LAST_STRIPE, _FOLD = 121, 11  # bytes of the secret


def secret_words(device: torch.device | str = "cpu") -> Tensor:
    """int64 `[32]`: the secret's 24 words, then the 8 that the last stripe meets."""
    words = [_word(8 * i) for i in range(24)] + [_word(_LAST_STRIPE + 8 * i) for i in range(8)]
    return torch.tensor([_signed(word) for word in words], dtype=torch.int64, device=device)


def accumulators(data: Tensor) -> Tensor:
    """int64 `[C, 8]` of chunks uint8 `[C, n]`; n is a multiple of 1024."""
    chunks, nbytes = data.shape
    if not nbytes or nbytes % BLOCK_BYTES:
        raise ValueError(f"chunks of {nbytes} bytes, expected a multiple of {BLOCK_BYTES}")
    words = data.contiguous().view(torch.int64).view(chunks, -1, STRIPES, LANES)
    secret = secret_words(data.device)
    keys = torch.stack([secret[n : n + LANES] for n in range(STRIPES)])
    last_keys = torch.cat((keys[:-1], secret[None, 24:]))
    acc = torch.tensor([_signed(word) for word in INITIAL], device=data.device).repeat(chunks, 1)
    swapped = torch.arange(LANES, device=data.device) ^ 1
    blocks = words.shape[1]
    for block in range(blocks):
        last = block == blocks - 1
        found = words[:, block]
        mixed = found ^ (last_keys if last else keys)
        acc = acc + (found[..., swapped] + (mixed & 0xFFFFFFFF) * _shift(mixed, 32)).sum(1)
        if not last:
            acc = (acc ^ _shift(acc, 47) ^ secret[16:24]) * SCRAMBLE_PRIME
    return acc


def digests(acc: Tensor, nbytes: Tensor) -> Tensor:
    """XXH3-64 of chunks of `nbytes` (int64 `[C]`) with accumulators `acc`: int64 `[C]`."""
    keys = torch.tensor(
        [_signed(_word(_FOLD + 8 * i)) for i in range(LANES)], device=acc.device
    ).view(4, 2)
    a, b = ((acc.view(-1, 4, 2) ^ keys)[..., i] for i in range(2))
    h = nbytes * _signed(_PRIME64_1) + _folded_product(a, b).sum(1)
    h = (h ^ _shift(h, 37)) * _signed(_AVALANCHE)
    return h ^ _shift(h, 32)


def _folded_product(a: Tensor, b: Tensor) -> Tensor:
    """The halves of the 128-bit product of unsigned words, XORed."""
    a0, a1, b0, b1 = a & 0xFFFFFFFF, _shift(a, 32), b & 0xFFFFFFFF, _shift(b, 32)
    middle = a1 * b0 + _shift(a0 * b0, 32)  # below 2^64
    other = a0 * b1 + (middle & 0xFFFFFFFF)
    high = a1 * b1 + _shift(middle, 32) + _shift(other, 32)
    return high ^ (a * b)


def _shift(words: Tensor, by: int) -> Tensor:
    """To the right, filled with zeros."""
    return (words >> by) & ((1 << (64 - by)) - 1)


def _word(at: int) -> int:
    return int.from_bytes(_SECRET[at : at + 8], "little")


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
