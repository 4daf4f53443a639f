"""Features of media: made once, bounded, of the content; and connectors, which make tokens of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from of_parts import MLP, RESAMPLER, parts, write

from atoll.aggregate.base import modality_of
from atoll.data.media import Unusable
from atoll.data.tokenize import prepare
from atoll.errors import AtollError
from atoll.models.assembled import assembled
from atoll.models.connectors import Connector, make_connector
from atoll.models.features import Features, features_of, touched
from atoll.models.load import load_model
from atoll.models.shapes import shapes
from atoll.models.spaces import lora


@pytest.mark.parametrize(
    ("written", "positions", "tokens"),
    [(MLP, 17, 5), ({"use": "mlp"}, 17, 17), (RESAMPLER, 17, 3), ({"use": "alignment", "stride": 5}, 17, 3)],
)
def test_a_connector_gives_the_tokens_it_says(written, positions, tokens):
    made = Connector(make_connector(written), positions, 6, 8)
    assert made(torch.randn(2, positions, 6), torch.randn(20, 8)).shape == (2, tokens + 2, 8)


def test_alignment_is_attention_over_the_embeddings_and_anchors_over_some_of_them():
    torch.manual_seed(0)
    features, embeddings = torch.randn(2, 17, 6), torch.randn(40, 8)
    exact = make_connector({"use": "alignment", "stride": 4, "heads": 2}).body(17, 6, 8)
    few = make_connector({"use": "alignment", "stride": 4, "heads": 2, "anchors": 5}).body(17, 6, 8)
    few.load_state_dict(exact.state_dict())
    queries = exact.norm(exact.reduce(features.transpose(1, 2)).transpose(1, 2))
    query, key, value = exact.attention.in_proj_weight.chunk(3)
    given = zip((queries, embeddings, embeddings), (query, key, value), strict=True)
    q, k, v = ((x @ w.T).unflatten(-1, (2, 4)).transpose(-3, -2) for x, w in given)
    mixed = torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v
    by_hand = exact.attention.out_proj(mixed.transpose(-3, -2).flatten(-2))
    torch.testing.assert_close(exact(features, embeddings), by_hand)
    torch.testing.assert_close(few(features, embeddings), exact(features, embeddings[[0, 10, 20, 29, 39]]))


def test_adapters_are_for_text_and_connectors_train_whole():
    model, _ = load_model(parts())
    space = lora(rank=2, modules=["connectors"])
    planned = space.plan(shapes(parts()))
    trained = {name: tuple(p.shape) for name, p in space.trainable(space.prepare(model, 0)).items()}
    assert trained == planned
    assert {modality_of(name) for name in trained} == {"all", "image", "audio"}
    assert all(".language_model." in name or ".connectors." in name for name in trained)
    for where in (lambda: space_of("conectors").plan(shapes(parts())), lambda: space_of("conectors").prepare(model, 0)):
        with pytest.raises(AtollError, match="did you mean 'connectors'"):
            where()


def space_of(module: str) -> Any:
    return lora(modules=[module])


def test_features_are_made_once_and_no_more_is_kept_than_may_be(tmp_path, media):
    model, _ = load_model(parts())
    found = features_of(model)
    kept = Features(found.model, found.preparations, found.identities, tmp_path / "features")
    told: list[tuple[int, int]] = []
    assert kept.fill([*media, media[0]], lambda done, of: told.append((done, of))) == 0
    assert told[-1] == (3, 3)
    assert oct(kept.folder.stat().st_mode)[-3:] == "700"
    first = kept.of(media)
    model.encode = lambda *_: pytest.fail("a kept feature was made again")  # type: ignore[method-assign]
    assert all(torch.equal(x, first[name]) for name, x in kept.of(media).items())
    assert kept.fill(media) == 0
    del model.encode
    small = Features(found.model, found.preparations, found.identities, tmp_path / "features", most_bytes=1)
    small.fill([])
    assert not list((tmp_path / "features").rglob("*.npy"))
    assert all(torch.equal(x, first[name]) for name, x in small.of(media).items())


def test_no_more_features_are_kept_at_any_time(tmp_path, media):
    found, folder = features_of(load_model(parts())[0]), tmp_path / "features"
    images = [one for one in media if one.modality == "image"]
    kept = Features(found.model, found.preparations, found.identities, folder)
    kept.most_bytes = 2 * kept._size("image") - 1

    def held() -> int:
        return sum(path.stat().st_size for path in folder.rglob("*.npy"))

    told: list[tuple[int, int]] = []
    assert kept.fill(images, lambda done, of: told.append((done, of))) == len(images) - 1, "for one there is room"
    assert told == [(1, 1)]
    for one in images:
        kept.of([one])
        assert held() == kept._size("image")


def test_a_feature_that_another_process_takes_away_is_made_again(tmp_path, media, monkeypatch):
    found = features_of(load_model(parts())[0])
    kept = Features(found.model, found.preparations, found.identities, tmp_path / "features")
    first = kept.of(media[:1])["image"]
    (file,) = (tmp_path / "features").rglob("*.npy")
    with monkeypatch.context() as late:
        late.setattr("atoll.models.features.touched", lambda path: (file.unlink(), touched(path))[1])
        assert torch.equal(kept.of(media[:1])["image"], first), "it goes between reading and noting that it was read"
    assert torch.equal(kept.of(media[:1])["image"], first)
    kept.folder = SimpleNamespace(glob=lambda pattern: [file, tmp_path / "gone.npy"])  # type: ignore[assignment]
    kept._bound()
    assert file.is_file()


def test_a_connector_begins_alike_whatever_it_is_between():
    one = load_model(assembled("tiny:llama", {"encoder": "tiny:clip", "connector": RESAMPLER}))[0]
    other = load_model(assembled("tiny:gpt2", {"encoder": "tiny:siglip", "connector": RESAMPLER}))[0]
    mine, theirs = (dict(model.connector("image").body.named_parameters()) for model in (one, other))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(x, theirs[name]) for name, x in mine.items())
    assert float(mine["queries"].detach().std()) > 0


def test_dropout_is_as_said_of_one_folder():
    spared = [
        load_model(assembled("tiny:llama", {"encoder": "tiny:clip", "connector": MLP, "dropout": share}))[0]
        for share in (0.0, 0.25)
    ]
    assert [model.connector("image").dropout for model in spared] == [0.0, 0.25]
    assert [model.config.image["dropout"] for model in spared] == [0.0, 0.25]
    assert len({model.config._name_or_path for model in spared}) == 1


def test_a_damaged_feature_is_made_again(tmp_path, media):
    found = features_of(load_model(parts())[0])
    kept = Features(found.model, found.preparations, found.identities, tmp_path / "features")
    first = kept.of(media[:1])["image"]
    (file,) = (tmp_path / "features").rglob("*.npy")
    whole = file.read_bytes()
    other = whole.replace(b"(64, 32)", b"(32, 64)").replace(b"(17, 32)", b"(32, 17)")
    damaged = [whole[:0], whole[:40], whole[:200], whole + b"x", b"PK\x03\x04" + whole[4:], other]
    damaged += [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(0, 128, 7)]
    for content in damaged:
        file.write_bytes(content)
        assert torch.equal(kept.of(media[:1])["image"], first)
        assert file.read_bytes() == whole


def test_media_are_those_that_the_data_were_read_with(tmp_path, media):
    model, tokenizer = load_model(parts())
    found = features_of(model)
    kept = Features(found.model, found.preparations, found.identities, tmp_path / "features")
    write(tmp_path / "site", [{"images": ["a.png"]}])
    picture = tmp_path / "site" / "a.png"
    picture.write_bytes(media[0].path.read_bytes())
    data = prepare(tmp_path / "site", tokenizer, 256, cache_root=tmp_path / "home", senses=kept.senses)
    [(medium,)] = data.train.media
    first = kept.of([medium])["image"]
    picture.write_bytes(media[1].path.read_bytes())
    assert torch.equal(kept.of([medium])["image"], first), "as it was, while it is kept"
    shutil.rmtree(tmp_path / "features")
    with pytest.raises(Unusable, match="image that has changed since the data were read"):
        kept.of([medium])
    picture.unlink()
    with pytest.raises(Unusable, match="image that is gone since the data were read"):
        kept.of([medium])


def test_what_is_missing_is_learned_and_what_drops_out_is_taken_for_missing():
    torch.manual_seed(0)
    connector = Connector(make_connector(MLP), 8, 16, 32, dropout=0.5)
    embeddings, features = torch.randn(9, 32), torch.randn(6, 8, 16)
    torch.nn.init.normal_(connector.null)
    said = connector.eval()(features, embeddings)
    features[2] = float("nan")
    without = connector(features, embeddings)
    assert torch.equal(without[2, 1:-1], connector.null.expand(2, -1))
    assert all(torch.equal(without[i], said[i]) for i in (0, 1, 3, 4, 5))
    torch.manual_seed(1)
    trained = connector.train()(features, embeddings)
    dropped = [i for i in range(6) if torch.equal(trained[i, 1:-1], connector.null.expand(2, -1))]
    assert 2 in dropped
    assert 1 < len(dropped) < 6
    trained.sum().backward()
    assert torch.isfinite(connector.null.grad).all()
    assert all(x.grad is None or torch.isfinite(x.grad).all() for x in connector.parameters())


def test_another_preprocessing_is_another_model(tmp_path):
    from atoll.models.ref import resolve
    from atoll.models.tiny import tiny_encoder

    folder = Path(shutil.copytree(tiny_encoder("tiny:clip", "image"), tmp_path / "clip"))
    one = assembled("tiny:llama", {"encoder": str(folder), "connector": MLP})
    before = resolve(one).identity
    written = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(written | {"image_mean": [0.1, 0.1, 0.1]}))
    assert resolve(one).identity != before
