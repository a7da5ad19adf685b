"""Sampling: probs against their definition, the loop around them, and the cache against no cache."""

import copy
import importlib
from dataclasses import replace

import pytest
import tiktoken
import torch

from gptlit.config import GPTConfig
from gptlit.data.tokenizer import load_tokenizer
from gptlit.errors import InputError
from gptlit.generation import fast_linear
from gptlit.generation.fast_linear import Int8Linear, RowLinear, for_generation
from gptlit.generation.generate import complete, generate, stream
from gptlit.generation.sampling import Sampling
from gptlit.model.gpt import GPTModel
from gptlit.model.kv_cache import KVCache

generate_module = importlib.import_module("gptlit.generation.generate")  # the package has a function of that name

LOGITS = torch.tensor([[4.51, 0.89, -1.9, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79]])
CONFIG = GPTConfig(vocab_size=31, context_length=8, emb_dim=16, n_heads=2, n_layers=2, drop_rate=0.5)
TEXT_CONFIG = GPTConfig(context_length=24, emb_dim=16, n_heads=2, n_layers=1, drop_rate=0.0)


@pytest.fixture
def model() -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(CONFIG)


def greedy_without_cache(model: GPTModel, prompt: list[int], count: int) -> list[int]:
    """The definition: read the last `context_length` ids, take the likeliest next one."""
    model.eval()
    ids = torch.tensor([prompt])
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids[:, -model.config.context_length :])[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


# --- distributions ----------------------------------------------------------------------------------------------


def test_top_k_is_the_books() -> None:
    probs = Sampling(temperature=1.0, top_k=3).probs(LOGITS)[0]
    expected = torch.zeros(9)
    expected[[0, 3, 7]] = torch.tensor([0.0615, 0.5775, 0.3610])
    torch.testing.assert_close(probs, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, [3]), (0.6, [3, 7]), (0.95, [3, 7, 0]), (1.0, list(range(9)))])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: list[int]) -> None:
    full = torch.softmax(LOGITS[0], dim=-1)
    probs = Sampling(temperature=1.0, top_p=top_p).probs(LOGITS)[0]
    assert sorted(kept) == probs.nonzero().flatten().tolist()
    torch.testing.assert_close(probs[kept], full[kept] / full[kept].sum())


def test_temperature_divides_the_logits() -> None:
    torch.testing.assert_close(Sampling(temperature=2.0).probs(LOGITS), torch.softmax(LOGITS / 2.0, dim=-1))


def test_a_tiny_temperature_is_greedy() -> None:
    probs = Sampling(temperature=1e-40).probs(LOGITS)[0]
    assert probs.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0]


def test_top_k_keeps_k_of_equals() -> None:
    assert int((Sampling(1.0, top_k=2).probs(torch.zeros(1, 5)) > 0).sum()) == 2


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0), Sampling(1.7), Sampling(0.6, top_k=4), Sampling(1.3, top_p=0.8)], ids=str
)
def test_drawn_frequencies_are_the_probabilities(sampling: Sampling) -> None:
    """Chi-square over 20,000 draws; 99.99% of the time below mean + 5 deviations."""
    generator = torch.Generator().manual_seed(5)
    drawn = sampling.draw(LOGITS.expand(20_000, -1), generator)
    # The definition, written another way: softmax, sort, cut, renormalize.
    probs = (LOGITS[0].double() / sampling.temperature).exp()
    probs /= probs.sum()
    order = probs.argsort(descending=True).tolist()
    kept = order[: sampling.top_k]
    if sampling.top_p is not None:
        total, kept = 0.0, []
        for token in order:
            kept.append(token)
            total += float(probs[token])
            if total >= sampling.top_p:
                break
    expected = {token: 20_000 * float(probs[token] / probs[kept].sum()) for token in kept}
    counts = torch.bincount(drawn, minlength=9).tolist()
    assert sum(counts[token] for token in kept) == 20_000
    chi_square = sum((counts[token] - expected[token]) ** 2 / expected[token] for token in kept)
    freedom = len(kept) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be at least 0, got nan"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
    ],
)
def test_settings_out_of_range_are_named(model: GPTModel, settings: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        generate(model, torch.tensor([[1]]), 1, **settings)  # type: ignore[arg-type]


# --- the loop and its cache -------------------------------------------------------------------------------------


def test_greedy_takes_the_likeliest_and_the_window_slides(model: GPTModel) -> None:
    prompt = torch.randint(0, 31, (2, 5))
    ids = generate(model, prompt, 10)
    assert model.training
    assert ids.shape == (2, 15)
    assert ids.dtype == torch.int64
    for row, start in zip(ids.tolist(), prompt.tolist(), strict=True):
        assert row == start + greedy_without_cache(model, start, 10)


@pytest.mark.parametrize("lengths", [(1, 3, 7), (2, 8, 12), (9,)])
def test_a_batch_of_any_lengths_is_as_one_by_one_without_a_cache(model: GPTModel, lengths: tuple[int, ...]) -> None:
    model.eval()
    prompts = [torch.randint(0, 31, (length,)).tolist() for length in lengths]
    steps = list(stream(model, prompts, 14))
    for row, prompt in enumerate(prompts):
        assert [int(ids[row]) for ids in steps] == greedy_without_cache(model, prompt, 14)


def test_a_seed_reproduces_and_top_k_one_is_greedy(model: GPTModel) -> None:
    def draw(seed: int, **settings: float | int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        ids = generate(model, torch.tensor([[1, 2]]), 20, temperature=1.5, generator=generator, **settings)  # type: ignore[arg-type]
        return ids[0].tolist()

    assert draw(1) == draw(1) != draw(2)
    assert draw(1, top_k=1) == generate(model, torch.tensor([[1, 2]]), 20)[0].tolist()
    assert draw(1, top_k=1000) == draw(1)


def test_rows_end_at_the_end_of_text(model: GPTModel) -> None:
    greedy = generate(model, torch.tensor([[1], [2]]), 12)
    eos_id = int(greedy[0, 3])
    ids = generate(model, torch.tensor([[1], [2]]), 12, eos_id=eos_id)
    for row, free in zip(ids.tolist(), greedy.tolist(), strict=True):
        end = free.index(eos_id, 1) if eos_id in free[1:] else len(free)
        assert row[:end] == free[: min(end, len(row))]
        assert set(row[end:]) <= {eos_id}
    alone = generate(model, torch.tensor([[1]]), 12, eos_id=eos_id)
    assert alone.shape[1] == greedy[0].tolist().index(eos_id, 1) + 1


def test_bad_prompts_are_named(model: GPTModel) -> None:
    with pytest.raises(InputError, match="the prompt is empty"):
        generate(model, torch.zeros(1, 0, dtype=torch.int64), 1)


# --- fast linear layers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_stay_close(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=300, context_length=32, emb_dim=64, n_heads=2, n_layers=2, drop_rate=0.0, init="gpt2")
    model = GPTModel(config).eval().to(dtype)
    ids = torch.randint(0, 300, (3, 30))
    with torch.no_grad():
        before = model(ids).float()
        quantized = for_generation(model, "int8")
        torch.testing.assert_close(quantized(ids).float(), before, atol=0.02, rtol=0.02)
        one = quantized(ids[:1, :1]).float()  # a single row takes another way
        torch.testing.assert_close(one, before[:1, :1], atol=0.02, rtol=0.02)
    assert quantized.trf_blocks[0].att.qkv.weight.dtype == torch.int8


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_packed_and_plain_8_bits_are_the_same_numbers(rows: int) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(24, 10)
    plain, packed = (Int8Linear(linear, packed=packed, exact=True) for packed in (False, True))
    assert packed.weight.shape == (10, 6)
    x = torch.randn(2, rows, 24)[:1] if rows == 1 else torch.randn(1, rows, 24)
    expected = x @ (plain.weight.float() * plain.scale[:, None]).T + linear.bias
    torch.testing.assert_close(packed(x), expected)
    torch.testing.assert_close(plain(x), expected)
    torch.testing.assert_close(Int8Linear(linear, packed=False)(x), expected, atol=2e-2, rtol=2e-2)
    in_bf16 = Int8Linear(linear.bfloat16(), packed=False)(x.bfloat16())
    torch.testing.assert_close(in_bf16.float(), expected, atol=2e-2, rtol=2e-2)
    assert not Int8Linear(torch.nn.Linear(6, 3), packed=True).packed


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 1), (2, 3)])
def test_a_few_rows_are_multiplied_from_the_left(
    shape: tuple[int, int], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(24, 10, bias=bias), torch.randn(*shape, 24)
    expected = linear(x)
    monkeypatch.setattr(fast_linear, "HAS_ONLY_AVX2", True)
    monkeypatch.delattr(fast_linear.F, "linear")
    torch.testing.assert_close(RowLinear(linear)(x), expected)


def test_a_model_can_be_quantized_after_it_was_optimized(model: GPTModel) -> None:
    quantized = for_generation(for_generation(model), "int8")
    assert quantized.out_head.weight.dtype == torch.int8
    assert [name for name, layer in quantized.named_modules() if getattr(layer, "exact", False)] == ["out_head"]


def test_an_unknown_quantization_is_named(model: GPTModel) -> None:
    with pytest.raises(InputError, match="quantize 'int3' is unknown"):
        for_generation(model, "int3")


def test_the_cache_has_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat asks for another one each time, and a compiled step is compiled for each."""
    model, sizes = GPTModel(replace(CONFIG, context_length=50)).eval(), set()

    def cache(model: GPTModel, rows: int, size: int) -> KVCache:
        sizes.add(size)
        return KVCache(model, rows, size)

    monkeypatch.setattr(generate_module, "KVCache", cache)
    for length in range(1, 49):
        list(stream(model, [[1] * length], 2))
    assert sizes == {4, 8, 16, 32, 50}


def test_compiling_without_a_compiler_is_named(model: GPTModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"compile needs a C\+\+ compiler"):
        for_generation(model, compile=True)


@pytest.mark.slow
def test_compiled_text_is_the_same(model: GPTModel) -> None:
    model.eval()
    prompts = [[1, 2, 3], [4]]
    expected = [ids.tolist() for ids in stream(model, prompts, 6)]
    alone = [ids.tolist() for ids in stream(model, prompts[:1], 6)]
    fast = for_generation(copy.deepcopy(model), compile=True)
    assert [ids.tolist() for ids in stream(fast, prompts, 6)] == expected
    assert [ids.tolist() for ids in stream(fast, prompts[:1], 6)] == alone
    eager = for_generation(copy.deepcopy(model), "int8")
    packed = for_generation(copy.deepcopy(model), "int8", compile=True)
    texts = [[int(ids[0]) for ids in stream(fast, prompts[:1], 6)] for fast in (eager, packed)]
    assert texts[0] == texts[1]


# --- text -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def writer() -> tuple[GPTModel, tiktoken.Encoding]:
    torch.manual_seed(0)
    return GPTModel(TEXT_CONFIG).eval(), load_tokenizer("gpt2")


def test_text_comes_in_pieces_that_add_up(writer: tuple[GPTModel, tiktoken.Encoding]) -> None:
    pieces: dict[int, str] = {0: "", 1: ""}

    def show(row: int, text: str) -> None:
        assert text
        pieces[row] += text

    results = complete(*writer, ["Hello", "A much longer prompt"], 40, Sampling(1.0), seed=3, on_text=show)
    tokenizer = writer[1]
    for row, result in enumerate(results):
        assert result.text == pieces[row] == tokenizer.decode(result.token_ids)
        assert len(result.token_ids) == 40
        assert result.reason == "length"


def test_a_seed_reproduces_the_texts(writer: tuple[GPTModel, tiktoken.Encoding]) -> None:
    def texts(seed: int | None) -> list[str]:
        return [result.text for result in complete(*writer, ["Hello", "Well"], 20, Sampling(1.0), seed=seed)]

    assert texts(3) == texts(3) != texts(4)
    assert texts(None) != texts(None)


def test_a_stop_string_ends_the_text_and_is_not_shown(writer: tuple[GPTModel, tiktoken.Encoding]) -> None:
    free = complete(*writer, ["Hello"], 30)[0]
    stop = free.text[20:26]  # spans tokens
    shown: list[str] = []
    result = complete(*writer, ["Hello"], 30, stop=["never met", stop], on_text=lambda _, text: shown.append(text))[0]
    assert result.reason == "stop"
    assert result.text == free.text[: free.text.index(stop)] == "".join(shown)
    assert complete(*writer, ["Hello"], 5, stop=["never met"])[0].reason == "length"


def test_the_end_of_text_token_ends_it(writer: tuple[GPTModel, tiktoken.Encoding]) -> None:
    model, tokenizer = writer
    forced = GPTModel(TEXT_CONFIG).eval()
    forced.load_state_dict(model.state_dict())
    with torch.no_grad():
        forced.final_norm.weight.zero_()
        forced.final_norm.bias.fill_(1.0)
        forced.out_head.weight[tokenizer.eot_token] = 9.0
    result = complete(forced, tokenizer, ["Hello"], 9)[0]
    assert (result.reason, result.text, result.token_ids) == ("end", "", [tokenizer.eot_token])


def test_characters_of_several_tokens_are_not_torn() -> None:
    from gptlit.generation.generate import _Row

    tokenizer = load_tokenizer("gpt2")
    pieces: list[str] = []
    row = _Row("", tokenizer, [], pieces.append)
    for token in tokenizer.encode_ordinary("a 🙂 日本"):
        row.add(token)
    assert "".join(pieces) == "a 🙂 日本"
    assert "\ufffd" not in "".join(pieces)


def test_empty_prompts_and_stops_are_refused(writer: tuple[GPTModel, tiktoken.Encoding]) -> None:
    with pytest.raises(InputError, match="a prompt or a stop string is empty"):
        complete(*writer, ["Hello", ""])
    with pytest.raises(InputError, match="a prompt or a stop string is empty"):
        complete(*writer, ["Hello"], stop=[""])
