#!/usr/bin/env python3
"""Makes tests/golden-slices: weights chosen to be awkward, and their slices by a third implementation.

Needs numpy. Written from docs/slices.md alone, so that it can contradict the encoders in Rust.
usage: slices_golden.py [FOLDER]
"""

import json
import struct
import sys
from pathlib import Path

import numpy as np

GROUP, BLOCK_ROWS = 32, 16


def to_bf16(values):
    """Nearest BF16, ties to even, as uint16."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def widen(dtype, raw):
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)


def awkward(rng, rows, cols):
    """Gaussian weights of many scales, with special groups sown in."""
    w = (rng.standard_normal((rows, cols)) * 10.0 ** rng.uniform(-9, 2.5, (rows, 1))).astype(np.float32)
    s = np.float32(2.0**-10)
    ties = (np.arange(GROUP, dtype=np.float32) * 7 + 4.5) * s
    ties[0], ties[-1] = 4 * s, 251 * s  # so that m is 0 and the scale exactly s
    special = [
        np.zeros(GROUP, np.float32),
        np.full(GROUP, -0.0, np.float32),
        np.where(np.arange(GROUP) % 2 == 0, np.float32(0.0), np.float32(-0.0)),
        np.full(GROUP, 0.3, np.float32),
        ties,
        -ties,
        np.linspace(-7000, 5000, GROUP, dtype=np.float32),
        np.linspace(14000, 15000, GROUP, dtype=np.float32),
        np.linspace(1e-40, 5e-39, GROUP, dtype=np.float32),
        np.linspace(-4e-8, 4e-8, GROUP, dtype=np.float32),
        np.linspace(-3e-6, 4e-6, GROUP, dtype=np.float32),
        np.linspace(1e-5, 4e-5, GROUP, dtype=np.float32),
    ]
    places = [(row, group) for row in range(rows) for group in range(cols // GROUP)]
    for values, place in zip(special, rng.permutation(len(places))):
        row, group = places[place]
        w[row, group * GROUP : (group + 1) * GROUP] = values
    return w


def energies(places, span, at):
    """Squared distances to the levels, in 256ths of an 8-bit step: at four bits and at eight."""
    at = ((places * span[..., None]) >> 16) + at[..., None]
    four, eight = (at + 128) % 4096 - 2048, (at + 128) % 256 - 128
    return (four * four).sum(-1), (eight * eight).sum(-1)


def scale_of(code):
    """int [n] to f32 [n]: five bits of exponent, four of mantissa, and 0."""
    value = (1 + code % 16 / 16) * 2.0 ** (code // 16 - 26)
    return np.where(code == 0, 0, value).astype(np.float32)


def zero_of(number):
    return (2.25 * number - 16).astype(np.float32)


def search(w):
    """f32 [n, 32] to the codes of scales and the numbers of zero points, int [n]."""
    f32 = np.float32
    low, high = w.min(axis=1), w.max(axis=1)
    span = np.maximum(high, f32(0)) - np.minimum(low, f32(0))
    some = span >= f32(2.0**-24)
    scales = scale_of(np.arange(512))
    first = np.maximum(np.searchsorted(scales, span / f32(256)), 1)  # the least that is at least as large
    assert (first <= 511).all()
    reach = high - low
    factor = np.where(reach > 0, f32(65535) / np.where(reach > 0, reach, f32(1)), f32(0))
    places = np.where(some[:, None], np.rint((w - low[:, None]) * factor[:, None]), 0).astype(np.int64)

    least = np.full(len(w), np.inf, f32)
    best_scale, best_zero = np.zeros(len(w), np.int64), np.zeros(len(w), np.int64)
    for more in range(4):
        code = first + more
        s = scale_of(code)
        bottom, wide = low / s, reach / s
        middle = np.rint(((f32(255) - wide) * f32(0.5) - bottom - f32(-16)) / f32(2.25))
        for aside in (-3, -2, -1, 0, 1, 2, 3):
            number = np.clip(middle + f32(aside), f32(0), f32(127))
            at, across = (bottom + zero_of(number)) * f32(256), wide * f32(256)
            outside = lambda o: o * (f32(96) * (o + f32(512)) + f32(8192))
            below, above = np.maximum(f32(-128) - at, f32(0)), np.maximum(at + across - f32(65408), f32(0))
            whole = lambda value, a, b: np.rint(np.clip(value, f32(a), f32(b))).astype(np.int64)
            four, eight = energies(places, whole(across, 0, 65535), whole(at, -30000, 90000))
            cost = ((four + 96 * eight).astype(f32) + outside(below) + outside(above)) * (s * s)
            better = (cost < least) & some & (code <= 511)
            least[better], best_scale[better], best_zero[better] = cost[better], code[better], number[better]
    return best_scale, best_zero


def encode(w):
    """f32 [rows, cols] to cells [blocks, groups, 288] and [blocks, groups, 256]."""
    rows, cols = w.shape
    blocks, groups = -(-rows // BLOCK_ROWS), cols // GROUP
    w = w.reshape(rows, groups, GROUP) + np.float32(0.0)
    code, number = (found.reshape(rows, groups) for found in search(w.reshape(-1, GROUP)))
    s, offset = scale_of(code)[..., None], (scale_of(code) * -zero_of(number))[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.rint((w - offset) / s)
    q = np.where(s == 0, np.float32(0), np.clip(q, 0, 255)).astype(np.uint8)
    constants = (code << 7 | number).astype("<u2")
    base = np.zeros((blocks, groups, 288), np.uint8)
    refine = np.zeros((blocks, groups, 256), np.uint8)
    for row in range(rows):
        block, r = divmod(row, BLOCK_ROWS)
        for j in range(4):
            for t in range(4):
                first, second = q[row, :, 8 * j + t], q[row, :, 8 * j + 4 + t]
                at = 64 * j + 4 * r + t
                base[block, :, at] = (first >> 4) | (second & 0xF0)
                refine[block, :, at] = (first & 15) | ((second & 15) << 4)
        base[block, :, 256 + 2 * r : 258 + 2 * r] = constants[row, :, None].copy().view(np.uint8)
    return base, refine


def write(path, tensors, metadata=None):
    """tensors: (name, dtype, shape, bytes), in the order of the file."""
    fields, start = [], 0
    if metadata:
        fields.append('"__metadata__":' + json.dumps(metadata, separators=(",", ":")))
    for name, dtype, shape, raw in tensors:
        entry = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + len(raw)]}
        fields.append(json.dumps(name) + ":" + json.dumps(entry, separators=(",", ":")))
        start += len(raw)
    header = ("{" + ",".join(fields) + "}").encode()
    header += b" " * (-(8 + len(header)) % 64)
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"".join(t[3] for t in tensors))


def main():
    out = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent / "tests/golden-slices")
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(20)
    matrices = [("a.norm.weight", "F32", (7,)), ("a.q_proj.weight", "BF16", (19, 64)), ("a.gate.weight", "BF16", (5, 32)),
                ("a.up_proj.weight", "F16", (33, 32)), ("a.q_proj.bias", "F16", (19,)), ("a.down_proj.weight", "F32", (16, 96))]
    exact, base, refine, small = [], [], [], []
    for name, dtype, shape in matrices:
        values = awkward(rng, *shape) if len(shape) == 2 else rng.standard_normal(shape).astype(np.float32)
        raw = {"F32": lambda v: v, "F16": lambda v: v.astype(np.float16), "BF16": to_bf16}[dtype](values)
        exact.append((name, dtype, shape, raw.tobytes()))
        if len(shape) != 2 or name.endswith("gate.weight"):
            small.append(exact[-1])
            continue
        coarse, fine = encode(widen(dtype, raw))
        base.append((name, "U8", coarse.shape, coarse.tobytes()))
        refine.append((name, "U8", fine.shape, fine.tobytes()))
    write(out / "exact.safetensors", exact)
    write(out / "base.safetensors", base + small, {"coel.format": "3", "coel.slice": "base"})
    write(out / "refine.safetensors", refine, {"coel.format": "3", "coel.slice": "refine"})


main()
