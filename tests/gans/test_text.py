"""Text encoders: what each gives for a caption against its own network's output, saving, loading offline, bad input."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from dalle.errors import UserError
from gans.clip_text import ClipTextEncoder, OpenClipTextEncoder
from gans.text import (
    TEXT_ENCODERS,
    Text,
    TextEncoder,
    length_mask,
    load_text_encoder,
)
from gans.transformers_text import TransformersTextEncoder

CAPTIONS = ["a red circle", "a blue square above a small red circle", ""]
VISION = {"layers": 1, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 32}
OPEN_CLIP = {"embed_dim": 8, "vision_cfg": VISION,
             "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)


@pytest.fixture
def open_clip_folder(tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": {}}))
    model = open_clip.CLIP(**OPEN_CLIP).eval()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder, model


def word_tokenizer(marks=("[PAD]", "[UNK]", "[CLS]", "[SEP]")):
    from transformers import PreTrainedTokenizerFast

    words = dict.fromkeys(word for caption in CAPTIONS for word in caption.split())
    vocabulary = {word: index for index, word in enumerate((*marks, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                                   sep_token="[SEP]", model_max_length=10)


def bert():
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                intermediate_size=16, max_position_embeddings=16)).eval()


def t5():
    from transformers import T5Config, T5Model

    return T5Model(T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()


def clip():
    from transformers import CLIPConfig, CLIPModel

    text = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "eos_token_id": 3,
            "num_attention_heads": 2, "max_position_embeddings": 12, "bos_token_id": 2, "pad_token_id": 0}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 16}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()


def saved(network, folder):
    network.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def check_frozen(encoder: TextEncoder, text: Text) -> None:
    """What every encoder promises."""
    batch = len(text.sentence)
    assert text.sentence.shape == (batch, encoder.sentence_dim)
    assert text.words.shape == (batch, encoder.word_dim, encoder.text_length)
    assert text.mask.shape == (batch, encoder.text_length) and text.mask.dtype == torch.bool
    assert text.mask.any(dim=1).all()
    assert not text.words.masked_select(~text.mask[:, None]).any()
    assert text.words.abs().sum(dim=1).gt(0).eq(text.mask).all()
    assert not any(part.requires_grad for part in (*text, *encoder.parameters()))
    assert not encoder.train().training and not any(module.training for module in encoder.modules())


def check_saved(encoder: TextEncoder, folder) -> None:
    encoder.save(folder)
    again = load_text_encoder(str(folder))
    assert type(again) is type(encoder)
    for part, expected in zip(again(CAPTIONS), encoder(CAPTIONS), strict=True):
        assert torch.equal(part, expected)


def test_captions_do_not_see_each_other(clip_folder):
    encoder = load_text_encoder(str(clip_folder))
    together = encoder(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        for part, whole in zip(encoder([caption]), together, strict=True):
            torch.testing.assert_close(part[0], whole[row], rtol=1e-5, atol=1e-6)


def test_a_mask_has_one_word_at_least():
    assert length_mask(torch.tensor([0, 1, 3]), 3).tolist() == [[True, False, False], [True, False, False], [True] * 3]


# -- CLIP, trained here

def test_clip_gives_its_embedding_and_its_towers_tokens(clip_folder):
    encoder = load_text_encoder(str(clip_folder))
    text = encoder(CAPTIONS)
    assert isinstance(encoder, ClipTextEncoder)
    check_frozen(encoder, text)
    assert (encoder.sentence_dim, encoder.word_dim, encoder.text_length) == (8, 16, 6)

    model, tokenizer = encoder.model, encoder.tokenizer
    ids = torch.stack([torch.from_numpy(tokenizer.encode(caption, 6)) for caption in CAPTIONS])
    torch.testing.assert_close(text.sentence, model.encode_text(ids))
    assert text.mask.sum(dim=1).tolist() == [min(6, max(1, tokenizer.count(caption))) for caption in CAPTIONS]
    # the last token's features, projected, are the embedding: here of the end mark, which is why it is no word
    towers = model.towers
    hidden = towers.token_embedding(model.wrap_captions(ids)) + towers.positional_embedding
    hidden = towers.ln_final(towers.transformer(hidden, attn_mask=towers.attn_mask))
    expected = hidden[:, 1:7].transpose(1, 2) * text.mask[:, None]
    torch.testing.assert_close(text.words, expected, rtol=1e-4, atol=1e-5)


def test_clip_comes_back(clip_folder, tmp_path):
    check_saved(load_text_encoder(str(clip_folder)), tmp_path / "again")


def test_captions_that_are_cut_are_named(clip_folder):
    encoder = load_text_encoder(str(clip_folder))
    (line,) = encoder.warnings(["a red circle", "circle " * 9])
    assert "9 tokens" in line and "6" in line


# -- open_clip

def test_open_clip_gives_its_towers_output(open_clip_folder):
    folder, model = open_clip_folder
    encoder = load_text_encoder(f"open_clip:{folder}")
    text = encoder(CAPTIONS)
    check_frozen(encoder, text)
    ids = open_clip.tokenizer.SimpleTokenizer(context_length=12)(CAPTIONS)
    torch.testing.assert_close(text.sentence, model.encode_text(ids))
    # the projected features at the end mark are the embedding; the marks themselves are no words
    assert text.mask.sum(dim=1).tolist() == [3, 8, 1]
    assert text.mask[1].tolist() == [False] + [True] * 8 + [False] * 3
    hidden = model.token_embedding(ids) + model.positional_embedding
    hidden = model.ln_final(model.transformer(hidden, attn_mask=model.attn_mask))
    torch.testing.assert_close(text.words[0, :, 1:4].T, hidden[0, 1:4], rtol=1e-4, atol=1e-5)


def test_open_clip_comes_back_without_its_image_tower(open_clip_folder, tmp_path):
    encoder = load_text_encoder(f"open_clip:{open_clip_folder[0]}")
    check_saved(encoder, tmp_path / "again")
    assert not any(name.startswith("model.visual") for name, _ in encoder.named_parameters())


def test_a_tower_with_a_tokenizer_of_transformers_comes_back(tmp_path):
    folder = tmp_path / "hub"
    text = {"context_length": 8, "vocab_size": 30, "width": 16, "heads": 2, "layers": 1, "no_causal_mask": True,
            "pool_type": "last", "hf_tokenizer_name": "nobody/nothing"}
    settings = {**OPEN_CLIP, "text_cfg": text, "custom_text": True, "init_logit_bias": -10.0, "quick_gelu": True}
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings, "preprocess_cfg": {}}))
    model = open_clip.CustomTextCLIP(**{key: value for key, value in settings.items() if key != "custom_text"})
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    word_tokenizer().save_pretrained(folder)
    encoder = load_text_encoder(f"open_clip:{folder}")
    check_frozen(encoder, encoder(CAPTIONS))
    assert encoder(CAPTIONS).mask.sum(dim=1).tolist() == [3, 6, 1]       # [CLS], [SEP] and padding are no words
    check_saved(encoder, tmp_path / "again")
    (line,) = encoder.warnings(["a red circle", "a " * 9])
    assert line.endswith("has 11 tokens, this model reads 8: the first 8 are kept")


# -- transformers

@pytest.mark.parametrize("make", [bert, t5])
def test_transformers_gives_hidden_states_and_their_mean(make, tmp_path):
    network, tokenizer = make(), word_tokenizer()
    encoder = load_text_encoder(f"transformers:{saved(network, tmp_path / 'network')}")
    text = encoder(CAPTIONS)
    assert isinstance(encoder, TransformersTextEncoder)
    check_frozen(encoder, text)
    assert encoder.text_length == 10
    for row, caption in enumerate(CAPTIONS):
        ids = tokenizer(caption, return_tensors="pt", truncation=True).input_ids
        part = network.get_encoder() if make is t5 else network
        hidden = part(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(text.sentence[row], hidden.mean(dim=0), rtol=1e-4, atol=1e-5)
        if caption:
            torch.testing.assert_close(text.words[row, :, 1 : len(hidden) - 1].T, hidden[1:-1], rtol=1e-4, atol=1e-5)
    check_saved(encoder, tmp_path / "again")
    (line,) = encoder.warnings(["a", "a " * 9])
    assert line.endswith("has 11 tokens, this model reads 10: the first 10 are kept")


def test_the_pooler_is_a_choice(tmp_path):
    folder = saved(bert(), tmp_path / "network")
    encoder = load_text_encoder(f"transformers:{folder}@pooler")
    sentence = encoder(CAPTIONS).sentence
    ids = word_tokenizer()(CAPTIONS[0], return_tensors="pt").input_ids
    torch.testing.assert_close(sentence[0], encoder.network(ids).pooler_output[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(sentence, load_text_encoder(f"transformers:{folder}")(CAPTIONS).sentence)
    check_saved(encoder, tmp_path / "again")


def test_of_a_model_that_sees_pictures_too_the_text_side_is_taken(tmp_path):
    network = clip()
    encoder = load_text_encoder(f"transformers:{saved(network, tmp_path / 'network')}@pooler")
    check_frozen(encoder, encoder(CAPTIONS))
    ids = word_tokenizer()(CAPTIONS[0], return_tensors="pt").input_ids
    torch.testing.assert_close(encoder(CAPTIONS).sentence[0], network.text_model(ids).pooler_output[0], rtol=1e-4,
                               atol=1e-5)
    assert not any("vision" in name for name, _ in encoder.named_parameters())
    check_saved(encoder, tmp_path / "again")


def test_pickled_weights_are_refused(tmp_path):
    network = bert()
    folder = saved(network, tmp_path / "network")
    (folder / "model.safetensors").unlink()
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_text_encoder(f"transformers:{folder}")


def test_code_beside_the_weights_is_refused(tmp_path):
    folder = saved(bert(), tmp_path / "network")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "nobodys", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError):
        load_text_encoder(f"transformers:{folder}")
    assert not (tmp_path / "ran").exists()


# -- errors

def broken_folder(tmp_path, kind):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    return str(folder)


@pytest.mark.parametrize("kind", ["clip", "open_clip_text", "transformers_text"])
def test_a_damaged_folder_is_one_line(kind, tmp_path):
    with pytest.raises(UserError) as error:
        load_text_encoder(broken_folder(tmp_path, kind))
    assert "\n" not in str(error.value) and "broken" in str(error.value)


@pytest.mark.parametrize(("name", "said"), [
    ("runs/nowhere", "runs/nowhere does not exist"),
    ("open_clip:ViT-B-33/openai", "nearest: ViT-B-32"),
    ("open_clip:ViT-B-32", "needs weights"),
    ("open_clip:coca_ViT-B-32//nowhere/w.safetensors", "no weights file"),
    ("transformers:/nowhere/at/all", "give the folder"),
])
def test_a_bad_name_is_one_line(name, said):
    with pytest.raises(UserError) as error:
        load_text_encoder(name)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_another_kind_of_model_is_named(tmp_path):
    with pytest.raises(UserError, match="'dvae' model, which is no text encoder; known: clip"):
        load_text_encoder(broken_folder(tmp_path, "dvae"))


def test_the_table_names_classes_of_their_own_kind():
    for kind in ("clip", "open_clip_text", "transformers_text"):
        assert TEXT_ENCODERS[kind].model_type == kind
    assert issubclass(TEXT_ENCODERS["open_clip_text"], OpenClipTextEncoder)
