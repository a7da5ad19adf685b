"""The `gptlit` command."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from typer.main import get_command

from conftest import ROOT, run_script
from gptlit.commands.main import app, main
from gptlit.data.tokenizer import load_tokenizer
from gptlit.errors import InputError

COMMANDS = get_command(app).commands  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    """A run of a tiny model."""
    from conftest import TINY
    from gptlit.training.cli import main as train

    folder = tmp_path_factory.mktemp("run")
    (folder / "words.txt").write_text(text)
    train(
        [
            "fit",
            *TINY,
            f"--data.source={folder / 'words.txt'}",
            f"--data.cache_dir={folder / 'data'}",
            f"--trainer.default_root_dir={folder / 'runs'}",
            "--trainer.max_steps=3",
        ]
    )
    return folder / "runs" / "t"


def test_generate_prints_prompt_and_continuation_and_nothing_else(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    texts = []
    folder = run / "version_0" / "checkpoints"
    for checkpoint in (run, run / "version_0", folder, folder / "step-00000003.ckpt"):
        main(["generate", f"--checkpoint={checkpoint}", "--prompt=The model", "--max_new_tokens=30", "--seed=4"])
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1
    assert texts[0].startswith("The model")
    assert len(texts[0]) > 40


def test_temperature_zero_needs_no_seed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for _ in range(2):
        main(["generate", f"--checkpoint={run}", "--prompt=a", "--temperature=0", "--max_new_tokens=5"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt="], "give either --prompt TEXT, of at least one character, or --prompts_file FILE"),
        (["--prompt=a", "--prompts_file=cut.ckpt"], "give either --prompt TEXT"),
        (["--prompts_file=cut.ckpt"], "cut.ckpt is not UTF-8: position"),
        (["--prompts_file=blank.txt"], "--prompts_file blank.txt has no prompt"),
        (["--prompt=a", "--top_k=0"], "top_k must be at least 1, got 0"),
        (["--prompt=a", "--top_p=0"], "top_p must be above 0 and at most 1, got 0.0"),
        (["--prompt=a", "--top_p=1.5"], "top_p must be above 0 and at most 1, got 1.5"),
        (["--prompt=a", "--temperature=-1"], "temperature must be at least 0, got -1.0"),
        (["--prompt=a", "--max_new_tokens=-1"], "Input should be greater than or equal to 0"),
        (["--prompt=a", "--checkpoint=nowhere"], "checkpoint 'nowhere' does not exist"),
        (["--prompt=a", "--checkpoint=cut.ckpt"], "cut.ckpt is damaged, truncated or no checkpoint"),
        (
            ["--prompt=a", "--checkpoint=other.ckpt"],
            "a vocabulary of 99 ids, but the default tokenizer 'gpt2' has 50257",
        ),
        (["--prompt=a", "--checkpoint=part.ckpt"], "has no tensor 'final_norm.bias' (shape (32,))"),
        (["--prompt=a", "--topk=3"], "No such option: --topk"),
        ([], "prompt"),
    ],
)
def test_bad_input_is_one_line(run: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str) -> None:
    from gptlit import GPTConfig, GPTModule

    newest = next(run.rglob("*.ckpt"))
    Path("blank.txt").write_text("\n\n")
    Path("cut.ckpt").write_bytes(newest.read_bytes()[:5000])
    part = torch.load(newest, weights_only=True)
    del part["state_dict"]["model.final_norm.bias"]
    torch.save(part, "part.ckpt")
    other = GPTModule(GPTConfig(vocab_size=99, context_length=8, emb_dim=8, n_heads=1, n_layers=1))
    other.configure_model()
    torch.save({"state_dict": other.state_dict(), "hyper_parameters": dict(other.hparams)}, "other.ckpt")
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(["generate", f"--checkpoint={run}", *flags])
    assert exit_.value.code in (1, 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert words in captured.err


def test_help_does_not_wait_for_torch(tmp_path: Path) -> None:
    code = "import sys; sys.argv[1:] = ['--help']\nfrom gptlit.commands.main import main\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    result = run_script("-c", code + "assert not {'torch', 'lightning', 'numpy'} & set(sys.modules)", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.search(r"generate +Continue prompts", result.stdout)


def test_python_m_gptlit_is_the_command(tmp_path: Path) -> None:
    result = run_script("-m", "gptlit", "generate", "--checkpoint=x", "--prompt=a", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("error: checkpoint 'x' does not exist")


def test_ctrl_c_ends_with_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gptlit.commands.inspect.user_path", interrupted)
    with pytest.raises(SystemExit) as exit_:
        main(["inspect", "folder"])
    assert exit_.value.code == 130


def test_a_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTLIT_TRACEBACK", "1")
    with pytest.raises(InputError, match="nowhere is no folder of tokens"):
        main(["inspect", "nowhere"])


def test_several_prompts_and_samples_as_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.txt").write_text("The model\n\nA longer prompt about trees\n")
    flags = ["--prompts_file=prompts.txt", "--num_samples=2", "--max_new_tokens=6", "--seed=1"]
    capsys.readouterr()
    main(["generate", f"--checkpoint={run}", *flags, "--json", "--stop=zzz"])
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [result["prompt"] for result in results] == ["The model"] * 2 + ["A longer prompt about trees"] * 2
    assert results[0]["text"] != results[1]["text"]
    for result in results:
        assert len(result["token_ids"]) <= 6
    main(["generate", f"--checkpoint={run}", *flags])
    assert "--- 4 of 4 ---\nA longer prompt" in capsys.readouterr().out


def test_batches_of_prompts_differ_by_nothing_but_their_random_numbers(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("prompts.txt").write_text("The model\nA longer prompt about trees\nThe model\n")
    flags = ["--prompts_file=prompts.txt", "--max_new_tokens=6", "--json"]
    capsys.readouterr()

    def generated(*more: str) -> list[str]:
        main(["generate", f"--checkpoint={run}", *flags, *more])
        return [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]

    assert generated("--temperature=0", "--batch_size=1") == generated("--temperature=0")
    first, _, last = generated("--seed=1", "--batch_size=1")
    assert first != last


TEXTS = [
    "# Title",
    "~",
    "---",
    "null",
    "&a",
    "1e3",
    "{}",
    "[1, 2]",
    "true",
    "*x",
    "a: b",
    "'q'",
    "- a",
    "@f",
    "🙂",
    "\udcff",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_taken_as_it_is_typed(text: str) -> None:
    words = ["--checkpoint", text, "--prompt", text, "--stop", text, f"--stop={text}"]
    values = COMMANDS["generate"].make_context("generate", words).params
    assert (values["checkpoint"], values["prompt"], list(values["stop"])) == (text, text, [text, text])


@pytest.mark.parametrize("name", ["--max_new_tokens", "--max-new-tokens"])
def test_names_of_options_have_dashes_or_underscores(name: str) -> None:
    with get_command(app).make_context("gptlit", ["generate", "--checkpoint=a", f"{name}=3"]) as context:
        rest = [*context._protected_args, *context.args]
        values = COMMANDS["generate"].make_context("generate", rest[1:], parent=context).params
    assert values["max_new_tokens"] == 3


def test_output_is_never_lost_to_its_encoding(run: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.jsonl").write_text(json.dumps({"body": "naïve 🙂 日本"}))
    for command in (
        ["generate", f"--checkpoint={run}", "--prompt=naïve 🙂 日本\udcff", "--max_new_tokens=3", "--num_samples=2"],
        ["evaluate", f"--checkpoint={run}", "--data=a.jsonl", "--text_key=body"],
        ["prepare", "a.jsonl", "--out=o", "--text_key=body", "--val_fraction=0"],
        ["inspect", "o"],
        ["chat", f"--checkpoint={run}", "--max_new_tokens=3"],
    ):
        for flags in ([], ["--json"]):
            if flags and command[0] in ("prepare", "chat"):
                continue
            output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
            monkeypatch.setattr("sys.stdout", output)
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff caf\xc3\xa9\n"), encoding="ascii"))
            main([*command, *flags])
            output.seek(0)
            shown = output.read()
            assert shown
            for line in shown.splitlines() if flags else ():
                assert json.loads(line)


def test_evaluate_prints_a_table_or_json(run: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.txt").write_text(text[:2000])
    capsys.readouterr()
    main(["evaluate", f"--checkpoint={run}", "--data=mine.txt"])
    table = capsys.readouterr().out
    main(["evaluate", f"--checkpoint={run}", "--data=mine.txt", "--json", "--precision=bf16", "--quantize=int8"])
    values = json.loads(capsys.readouterr().out)
    loss = float(re.search(r"loss +([\d.]+)", table)[1])  # type: ignore[index]
    assert values["loss"] == pytest.approx(loss, rel=0.01)
    assert re.search(r"stride +8\n", table)


def test_chat_reads_lines_until_the_end(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["/temperature 0", "The model", ""])

    def read(_: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    main(["chat", f"--checkpoint={run}", "--max_new_tokens=3"])
    assert "temperature is 0.0" in capsys.readouterr().out


def test_import_train_export_and_transformers_writes(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a model of Transformers through this project and back, as one would type it."""
    transformers = pytest.importorskip("transformers")
    from gptlit.training.cli import main as train

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_positions=32, n_embd=32, n_head=2, n_layer=2)
    transformers.GPT2LMHeadModel(config).save_pretrained("theirs")
    Path("mine.txt").write_text(text)
    main(["import", "theirs", "--out=ours.ckpt"])
    assert "2 layers, 2 heads, 32 wide, context 32, vocabulary 50,257" in capsys.readouterr().out
    finetune = [f"--config={ROOT / 'configs' / 'finetune.yaml'}", "--trainer.max_steps=20", "--data.source=mine.txt"]
    tiny = ["--model.config.context_length=16", "--data.batch_size=4", "--data.micro_batch_size=2", "--model.lr=3e-3"]
    train(["fit", *finetune, *tiny, "--model.init_from=ours.ckpt", "--trainer.enable_progress_bar=false"])
    assert "the table of positions is cut: from 32 to 16 tokens" in capsys.readouterr().err
    main(["export", "--checkpoint=runs/finetune", "--out=back"])
    model = transformers.AutoModelForCausalLM.from_pretrained("back")
    tokenizer = transformers.AutoTokenizer.from_pretrained("back")
    ids = model.generate(**tokenizer("the model", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    main(["generate", "--checkpoint=runs/finetune", "--prompt=the model", "--max_new_tokens=5", "--temperature=0"])
    assert capsys.readouterr().out.splitlines()[-1] in tokenizer.decode(ids[0])
    assert not torch.equal(
        model.transformer.wte.weight, transformers.GPT2LMHeadModel.from_pretrained("theirs").lm_head.weight
    )


def test_weights_are_trained_further_with_their_own_tokenizer(
    tmp_path: Path, text_file: Path, tokenizer_json: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    from conftest import TINY
    from gptlit import GPTConfig, GPTModel, GPTModule, TokenDataModule
    from gptlit.checkpoint.export import save_pretrained
    from gptlit.checkpoint.pretrained import read_weights
    from gptlit.data.tokenizer import load_tokenizer
    from gptlit.training.cli import main as train

    rows = load_tokenizer(str(tokenizer_json)).n_vocab + 1  # one that no text needs
    model = GPTModel(GPTConfig(vocab_size=rows, context_length=16, emb_dim=32, n_heads=2, n_layers=2))
    save_pretrained(model, "the weights", tokenizer=str(tokenizer_json))
    fit = ["fit", *TINY, f"--data.source={text_file}", "--trainer.max_steps=1", "--model.init_from=the weights"]
    train(fit)
    assert f"the vocabulary is cut: from {rows} to {rows - 1} ids" in capsys.readouterr().err
    found = read_weights("runs/t")
    assert (found.tokenizer, found.config.vocab_size) == (tokenizer_json.read_text(), rows - 1)
    own = ["fit", *TINY, f"--data.source={text_file}", "--trainer.max_steps=1", "--run.name=u"]
    train([*own, "--model.init_from=runs/t"])  # the tokenizer is in the checkpoint
    train([*own, "--trainer.max_steps=2", "--ckpt_path=last"])
    stored = yaml.safe_load(Path("runs/u/version_0/config.yaml").read_text())["data"]["tokenizer"]
    assert Path(stored).read_text() == found.tokenizer
    assert read_weights("runs/u").tokenizer == found.tokenizer
    main(["generate", "--checkpoint=the weights", "--prompt=a", "--max_new_tokens=3"])
    main(["import", "the weights", "--out=a.ckpt"])
    settings = json.loads(tokenizer_json.read_text())
    words = settings["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    Path("other.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit) as exit_:
        train([*fit, "--data.tokenizer=other.json"])
    assert exit_.value.code == 2
    assert "the weights was trained with the tokenizer" in capsys.readouterr().err
    assert not Path("runs/t/version_1").exists()
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    module = GPTModule(found.config, init_from="the weights")
    with pytest.raises(InputError, match="the weights was trained with the tokenizer"):
        trainer.fit(module, TokenDataModule(str(text_file), batch_size=4, tokenizer="other.json"))


def test_a_home_that_no_shell_has_expanded_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptlit import GPTConfig, GPTModel
    from gptlit.checkpoint.export import save_pretrained

    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    tiny = GPTConfig(vocab_size=99, context_length=8, emb_dim=64, n_heads=1, n_layers=1)
    save_pretrained(GPTModel(tiny), tmp_path / "home/book", "book")
    main(["import", "~/book/model.pth", "--out=~/a.ckpt"])
    main(["export", "--checkpoint=~/a.ckpt", "--out=~/back", "--to=book"])
    assert Path("home/a.ckpt").is_file()
    assert Path("home/back/model.pth").is_file()
    assert not Path("~").exists()


@pytest.mark.parametrize("tokenizer", ["gpt2", "nowhere.json"])
def test_a_tokenizer_that_cannot_be_that_of_the_weights(tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    from gptlit import GPTConfig, GPTModel
    from gptlit.checkpoint.export import save_pretrained

    save_pretrained(
        GPTModel(GPTConfig(vocab_size=99, context_length=8, emb_dim=64, n_heads=1, n_layers=1)), "o", "book"
    )
    with pytest.raises(SystemExit):
        main(["import", "o/model.pth", "--out=a.ckpt", f"--tokenizer={tokenizer}"])
    assert tokenizer in capsys.readouterr().err
    assert not Path("a.ckpt").exists()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["import", "nowhere", "--out=a.ckpt"], "checkpoint 'nowhere' does not exist"),
        (["import", "nowhere", "--out=a.pth"], "--out 'a.pth' must end in .ckpt"),
        (["export", "--checkpoint=nowhere", "--out=b"], "checkpoint 'nowhere' does not exist"),
        (["export", "--checkpoint=nowhere", "--out=b", "--to=onnx"], "onnx"),
        (["evaluate", "--checkpoint=nowhere", "--data=python-docs"], "checkpoint 'nowhere' does not exist"),
        (["import", "text.pth", "--out=a.ckpt"], "text.pth is damaged, truncated or no checkpoint"),
        (["evaluate", "--checkpoint=nowhere", "--data=none.txt"], "'none.txt' does not exist"),
        (["generate", "--checkpoint=nowhere", "--prompt=a", "--quantize=int3"], "int3"),
        (["chat", "--checkpoint=nowhere", "--top_k=0"], "top_k must be at least 1, got 0"),
    ],
)
def test_other_commands_answer_in_one_line_too(
    capsys: pytest.CaptureFixture[str], command: list[str], words: str
) -> None:
    Path("text.pth").write_text("the cat sat on the mat")
    with pytest.raises(SystemExit) as exit_:
        main(command)
    assert exit_.value.code in (1, 2)
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert words in err
    assert not list(Path().glob("*.ckpt"))


# --- prepare and inspect


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    """A dump in JSON lines, one of them broken."""
    lines = [json.dumps({"body": f"document {n} about trees and rivers"}) for n in range(300)]
    lines.insert(7, "{")
    (tmp_path / "dump.jsonl").write_text("\n".join(lines))
    return tmp_path / "dump.jsonl"


def test_prepare_inspect_and_train(dump: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from conftest import TINY
    from gptlit.training.cli import main as train

    main(["prepare", "dump.jsonl", "--out", "data/dump", "--text_key", "body", "--skip_bad", "--shard_tokens", "500"])
    out = capsys.readouterr().out
    assert re.search(r"^train +2\d\d +[\d,]+ +[\d,]+ +\d\.\d\d +\d$", out, re.MULTILINE), out
    assert "skipped, unreadable: 1 documents" in out
    command = re.search(r"^next: python -m gptlit fit (.*)", out, re.MULTILINE)
    assert command is not None
    assert command[1].endswith("--data.source data/dump")
    main(["inspect", "data/dump", "--verify", "--position", "3", "--length", "4"])
    out = capsys.readouterr().out
    assert "verified: " in out
    assert "train, tokens 3 to 7:\n" in out
    assert " trees and rivers" in out
    main(["inspect", "data/dump", "--json"])
    values = json.loads(capsys.readouterr().out)
    assert values["splits"]["train"]["documents"] + values["splits"]["val"]["documents"] == 300
    assert values["splits"]["train"]["median"] == 6
    train(["fit", *TINY, "--data.source=data/dump", "--trainer.max_steps=2"])
    assert Path("runs/t/version_0/checkpoints/step-00000002.ckpt").is_file()


def test_several_sources_and_separate_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b", "c", "d"):
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    main(["prepare", "a.txt", "b.txt", "--val_source", "c.txt", "--val_source", "d.txt", "--out=out"])
    capsys.readouterr()
    main(["inspect", "out", "--split", "val"])
    out = capsys.readouterr().out
    assert out.endswith("text c<|endoftext|>text d\n")
    assert re.search(r"^train +2 ", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("args", "words", "status"),
    [
        (["prepare", "dump.jsonl", "--out=o"], "dump.jsonl line 1 has no 'text', only 'body': set text_key", 1),
        (["prepare", "dump.jsonl", "--text_key=body", "--out=o"], "dump.jsonl line 8 is not JSON", 1),
        (["prepare", "nowhere", "--out=o"], "'nowhere' does not exist: give a text", 1),
        (["prepare", "", "--out=o"], "a path is empty", 1),
        (["prepare", "dump.jsonl"], "Missing option '--out'", 2),
        (["prepare", "--out=o"], "Missing argument 'source'", 2),
        (["prepare", "python-docs", "--out=."], "is not empty", 1),
        (["prepare", "dump.jsonl", "--out=o", "--shard_tokens=0"], "shard_tokens must be at least 1, got 0", 1),
        (["prepare", "dump.jsonl", "--out=o", "--num_workers=-1"], "num_workers must be at least 0, got -1", 1),
        (["prepare", "dump.jsonl", "--out=o", "--val_fraction=2"], "val_fraction 2.0 and test_fraction 0.0 must be", 1),
        (["prepare", "dump.jsonl", "--out=o", "--tokenizer=gpt9"], "no tokenizer is named 'gpt9'", 1),
        (["inspect", "nowhere"], "nowhere is no folder of tokens", 1),
        (["inspect", ".", "--verify"], "has no .bin file with 'train' in its name", 1),
        (
            ["inspect", ".", "--position=-1"],
            "Invalid value for '--position': Input should be greater than or equal to 0",
            2,
        ),
    ],
)
def test_what_prepare_and_inspect_refuse_is_one_line(
    dump: Path, args: list[str], words: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(args)
    captured = capsys.readouterr()
    assert exit_.value.code == status
    assert captured.out == ""
    assert re.match(r"error: .*" + re.escape(words), captured.err), captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("separator", ["###", "---", "~", "&x"])
def test_any_separator_is_taken_as_it_is(separator: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.txt").write_text(separator.join("abc"))
    main(["prepare", "a.txt", "--out=o", "--separator", separator, "--val_fraction=0"])
    main(["inspect", "o"])
    assert "a<|endoftext|>b<|endoftext|>c" in capsys.readouterr().out


def test_a_changed_shard_is_found_by_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("some text of a few words")
    main(["prepare", "a.txt", "--out=o"])
    shard = tmp_path / "o" / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[::-1])
    with pytest.raises(SystemExit):
        main(["inspect", "o", "--verify"])
    assert "train-00000.bin does not match the SHA-256 in its manifest.json" in capsys.readouterr().err


def test_a_reader_that_has_read_enough_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text of a few words " * 9)
    main(["prepare", "a.txt", "--out=o", "--val_fraction=0"])
    command = f"{sys.executable} -m gptlit inspect o --length 50 | true"
    result = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert (result.returncode, result.stderr) == (0, "")


def test_chat_without_standard_input_is_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(SystemExit) as exit_:
        main(["chat", f"--checkpoint={run}"])
    assert exit_.value.code == 1
    assert "chat reads standard input" in capsys.readouterr().err


# --- tokenizer


def test_a_tokenizer_is_trained_and_used(tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["tokenizer", str(text_file), "--vocab_size", "280", "--out", "own.json"])
    assert "own.json: 280 ids" in capsys.readouterr().out
    main(["prepare", str(text_file), "--tokenizer", "own.json", "--out", "data/own"])
    main(["inspect", "data/own"])
    assert "tokenizer.json" in capsys.readouterr().out
    trained, text = load_tokenizer("own.json"), text_file.read_text()
    assert trained.n_vocab == 280
    assert trained.decode(trained.encode_ordinary(text)) == text
    assert trained.decode([trained.eot_token]) == "<|endoftext|>"
    assert len(trained.encode_ordinary(text)) < 0.7 * len(text)  # merges


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["words.txt", "--vocab_size=100"],
            "--vocab_size must be at least 257 (256 bytes and the end of text), got 100",
        ),
        (["words.txt", "--vocab_size=300", "--out=there.json"], "--out there.json exists: name another file"),
        (["words.txt", "--vocab_size=300", "--out=own"], "--out own must be a .json file in an existing folder"),
        (["nowhere.txt", "--vocab_size=300"], "'nowhere.txt' does not exist"),
        (["broken.jsonl", "--vocab_size=300"], "broken.jsonl"),
    ],
)
def test_a_tokenizer_that_cannot_be_trained(
    words: list[str], message: str, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("there.json").write_text("{}")
    Path("broken.jsonl").write_text('{"text": "a"}\n{')
    with pytest.raises(SystemExit) as exit_:
        main(["tokenizer", "--out=own.json", *words])
    error = capsys.readouterr().err
    assert exit_.value.code == 1
    assert message in error
    assert error.count("\n") == 1
    assert not Path("own.json").exists()


def test_a_missing_package_for_tokenizers_is_named(
    text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(SystemExit):
        main(["tokenizer", str(text_file), "--vocab_size=300", "--out=own.json"])
    assert "pip install tokenizers" in capsys.readouterr().err
