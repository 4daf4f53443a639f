"""Claims on the assembled model, SmolLM2-135M + EfficientNet-lite0 + Whisper tiny.en, on the multimodal recipe's own data:

- a feature in the cache is read 50 times faster than it is encoded; reading takes under 2% of a local step;
- a local step takes at most 1.15 of what the language model's own takes on as many tokens, labeled in the same places;
- alignment over 1,024 anchors takes at most a fifth of that over all 49,152 embeddings; how far they differ is reported.
"""

from __future__ import annotations

from benchmarks.harness import Bar, Case, Contestant

MODULE = "benchmarks.ours.multimodal"
BARS = [
    Bar("multimodal", "features", "times", "image", at_least=50),
    Bar("multimodal", "features", "times", "audio", at_least=50),
    Bar("multimodal", "features", "percent_of_a_step", "image", at_most=2, unit="%"),
    Bar("multimodal", "features", "percent_of_a_step", "audio", at_most=2, unit="%"),
    Bar("multimodal", "assembled-step", "seconds", "assembled", against="text", at_most=1.15),
    Bar("multimodal", "alignment", "seconds", "anchors", against="exact", less_is_better=True, at_least=5),
    Bar("multimodal", "alignment", "difference", "anchors", unit="of the tokens' norm"),
]
SITES = {"image": "gallery", "audio": "station"}


def cases(tiny: bool) -> list[Case]:
    """Features of each modality; local steps; the two kinds of alignment."""
    model = "tiny" if tiny else "recipe"
    features = tuple(
        Contestant(name, MODULE, config={"what": "features", "model": model, "site": site})
        for name, site in SITES.items()
    )
    steps = tuple(
        Contestant(name, MODULE, config={"what": "step", "model": model, "media": name == "assembled", "steps": 8})
        for name in ("assembled", "text")
    )
    sizes = {"model": model, "positions": 49, "features": 1280, "media": 8}
    alignments = tuple(
        Contestant(name, MODULE, config={"what": "alignment", **sizes, "anchors": anchors})
        for name, anchors in (("anchors", 64 if tiny else 1024), ("exact", None))
    )
    return [Case("features", features), Case("assembled-step", steps), Case("alignment", alignments)]
