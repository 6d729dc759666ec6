"""The presets of `llamamem lab mqar`."""

from __future__ import annotations

from llamamem.lab.mqar_plan import ARMS, Mixer, Preset, Segment


def _mixers(width: int, heads: int, head: int, memory: tuple[int, int, int, int]) -> tuple[Mixer, ...]:
    """The recurrent arms at one size of state; `memory` is heads, rank, states and chunk of `rwkv-ms`."""
    own = tuple(Mixer(arm, width, heads, head) for arm in ("scalar-beta", "vector-beta", "rwkv7"))
    return (*own, Mixer("rwkv-ms", width, *memory))


# About an hour of one core. Chunks are short because sequences are: the shipped 1,024 would leave three states empty.
CPU = Preset(
    name="cpu",
    vocab=128,
    train=(Segment(32, 2, 512), Segment(32, 4, 512), Segment(32, 8, 512)),
    test=(Segment(32, 2, 512), Segment(32, 4, 512), Segment(32, 8, 512), Segment(64, 16, 512)),
    mixers=(
        *_mixers(32, 8, 4, (2, 4, 4, 8)),  # 128 floats
        *_mixers(32, 4, 8, (1, 8, 4, 8)),  # 256
        *_mixers(32, 2, 16, (2, 8, 4, 8)),  # 512
        Mixer("attention", 32, 2, 16),
    ),
    lrs=dict.fromkeys(ARMS, (7e-3, 1.4e-2)),
    seeds=(0, 1, 2),
    epochs=12,
    batch=32,
    fresh=True,
    by_turns=True,
    init=0.08,
)

# The data, schedule and sizes of the published experiment, with two arms more and three seeds.
PUBLISHED = Preset(
    name="published",
    vocab=8192,
    train=(
        Segment(64, 4, 100_000),
        Segment(128, 8, 20_000),
        Segment(256, 16, 20_000),
        Segment(256, 32, 20_000),
        Segment(256, 64, 20_000),
    ),
    test=(
        Segment(64, 4, 1000),
        Segment(64, 8, 1000),
        Segment(64, 16, 1000),
        Segment(128, 32, 1000),
        Segment(256, 64, 1000),
        Segment(512, 128, 1000),
        Segment(1024, 256, 1000),
    ),
    mixers=(*_mixers(64, 2, 32, (2, 16, 4, 64)), Mixer("attention", 64, 2, 32)),
    lrs=dict.fromkeys(ARMS, (1e-3, 10**-2.5, 1e-2, 10**-1.5))
    | {"scalar-beta": (1e-3, 10**-2.5, 1e-2, 10**-1.5, 4.6e-2)},
    seeds=(0, 1, 2),
    epochs=32,
    batch=256,
    fresh=False,
    by_turns=False,
    init=0.02,
    data_seed=123,
    dropout=0.1,
    clip=0.0,
    validation=200,
)

# A minute: that everything runs, not what it shows.
SMOKE = Preset(
    name="smoke",
    vocab=32,
    train=(Segment(16, 2, 64), Segment(16, 4, 64)),
    test=(Segment(16, 2, 64), Segment(16, 4, 64), Segment(32, 8, 64)),
    mixers=(*_mixers(16, 2, 8, (1, 8, 2, 8)), Mixer("attention", 16, 2, 8)),
    lrs=dict.fromkeys(ARMS, (1e-2, 2e-2)),
    seeds=(0, 1),
    epochs=2,
    batch=16,
    fresh=True,
    by_turns=True,
    init=0.08,
    validation=32,
)

PRESETS = {preset.name: preset for preset in (CPU, PUBLISHED, SMOKE)}
