"""The words of the shapes world: captions of what a clip shows, of its looks alone, and of its motion alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Kind = Literal["random", "full", "appearance", "motion"]
KINDS: tuple[Kind, ...] = ("full", "appearance", "motion")
_SHARES = (9, 2, 5)  # of KINDS, of 16 random captions: motion is what is hard to learn

_VERBS = ("moves", "goes", "slides")
_TURNS = ("rotates", "turns", "spins")
_MOTIONS = {
    **{
        way: tuple(f"{verb} {words}" for verb in _VERBS for words in (way, f"to the {way}"))
        for way in ("left", "right")
    },
    "up": tuple(f"{verb} {words}" for verb in _VERBS for words in ("up", "upwards")),
    "down": tuple(f"{verb} {words}" for verb in _VERBS for words in ("down", "downwards")),
    **{
        f"{way}-{side}": tuple(f"{verb} {words}" for verb in _VERBS for words in (f"{way} and {side}", f"{way}-{side}"))
        for way in ("up", "down")
        for side in ("left", "right")
    },
    "clockwise": tuple(f"{verb} clockwise" for verb in _TURNS),
    "counterclockwise": tuple(f"{verb} {words}" for verb in _TURNS for words in ("counterclockwise", "anticlockwise")),
    "grow": ("grows", "gets bigger", "becomes larger"),
    "shrink": ("shrinks", "gets smaller", "becomes smaller"),
    "bounce": ("bounces", "bounces up and down", "jumps up and down"),
    "still": ("stands still", "does not move", "stays in place"),
}
_FULL = ("{a} {motion}", "{a} {motion} {on}", "{a} that {motion}", "there is {a}; it {motion}", "{on}, {a} {motion}")
_APPEARANCE = ("{a}", "{a} {on}", "a picture of {a}", "there is {a}", "{on}, {a}")
_MOTION = ("it {motion}", "the object {motion}", "the shape {motion}", "something {motion}")


def caption(names: Mapping[str, str], kind: str, words: int) -> str:
    """A caption of a clip with these attributes; ``words``, a number in [0, 2^31), picks template and words."""

    def pick(count: int) -> int:
        nonlocal words
        words, choice = divmod(words, count)
        return choice

    if kind == "random":
        kind = [kind for kind, share in zip(KINDS, _SHARES, strict=True) for _ in range(share)][pick(sum(_SHARES))]
    motions = _MOTIONS[names["motion"]]
    look = f"{names['colour']} {names['shape']}"
    if pick(2):
        look = f"{names['size']} {look}"
    ground = (names["background"], f"{names['shade']} {names['background']}", names["shade"])[pick(3)]
    templates = {"full": _FULL, "appearance": _APPEARANCE, "motion": _MOTION}[kind]
    return templates[pick(len(templates))].format(
        a=f"{'an' if look[0] in 'aeiou' else 'a'} {look}",
        motion=motions[pick(len(motions))],
        on=f"on a {ground} background",
    )
