"""GPTModel: reference values, causality, and agreement with the book's own package."""

import math
from dataclasses import replace

import pytest
import torch
from llms_from_scratch.ch04 import GPTModel as BookModel

from gptlit.config import GPT_CONFIG_124M, PRESETS, GPTConfig
from gptlit.model.gpt import GELU, GPTModel
from gptlit.model.loss import next_token_loss
from gptlit.training.lightning_compat import recompute_cheap_ops

SMALL = GPTConfig(vocab_size=101, context_length=12, emb_dim=24, n_heads=3, n_layers=2, drop_rate=0.0)


def book_model_of(model: GPTModel) -> BookModel:
    """Return the book's model with the same weights."""
    config = model.config
    book = BookModel({key: getattr(config, key) for key in GPT_CONFIG_124M})
    state = {}
    for key, value in model.state_dict().items():
        if "att.qkv" in key:
            for name, part in zip(("W_query", "W_key", "W_value"), value.chunk(3), strict=True):
                state[key.replace("qkv", name)] = part
        elif "norm" in key:
            state[key.replace(".weight", ".scale").replace(".bias", ".shift")] = value
        else:
            state[key.replace(".ff.", ".ff.layers.")] = value
    missing, unexpected = book.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.endswith("att.mask") for key in missing)
    return book


@pytest.mark.parametrize(
    ("preset", "untied", "tied"),
    [
        ("gpt2-small", 163_009_536, 124_412_160),
        ("gpt2-medium", 406_212_608, 354_749_440),
        ("gpt2-large", 838_220_800, 773_891_840),
        ("gpt2-xl", 1_637_792_000, 1_557_380_800),
    ],
)
def test_parameter_counts(preset: str, untied: int, tied: int) -> None:
    def count(config: GPTConfig) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in GPTModel(config).parameters())

    assert count(PRESETS[preset]) == untied
    assert count(replace(PRESETS[preset], tie_weights=True)) == tied


def test_openais_124m_has_as_many_parameters() -> None:
    with torch.device("meta"):
        model = GPTModel(GPTConfig(tie_weights=True, qkv_bias=True))
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_seed_123_continues_as_in_the_book() -> None:
    torch.manual_seed(123)
    model = GPTModel(GPTConfig()).eval()
    ids = torch.tensor([[15496, 11, 314, 716]])
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert ids[0, 4:].tolist() == [27018, 24086, 47843, 30961, 42348, 7267]


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_logits_agree_with_the_books_package(qkv_bias: bool) -> None:
    torch.manual_seed(0)
    model = GPTModel(replace(SMALL, qkv_bias=qkv_bias))
    ids = torch.randint(0, SMALL.vocab_size, (3, 12))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), book_model_of(model)(ids), atol=1e-5, rtol=0)


def test_twenty_steps_agree_with_the_books_package() -> None:
    torch.manual_seed(0)
    model = GPTModel(SMALL)
    book = book_model_of(model)
    batches = torch.randint(0, SMALL.vocab_size, (20, 4, 13))
    curves = []
    for contender in (model, book):
        optimizer = torch.optim.AdamW(contender.parameters(), lr=1e-3, weight_decay=0.1)
        curve = []
        for batch in batches:
            optimizer.zero_grad()
            loss = next_token_loss(contender(batch[:, :-1]), batch[:, 1:])
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)


def test_a_token_sees_only_what_came_before() -> None:
    model = GPTModel(SMALL).eval()
    ids = torch.randint(0, SMALL.vocab_size, (1, 12))
    changed = ids.clone()
    changed[0, 7] = (ids[0, 7] + 1) % SMALL.vocab_size
    with torch.no_grad():
        before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().amax(dim=-1).min() > 1e-4


@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize("init", ["torch", "gpt2"])
def test_the_first_loss_is_about_ln_v(init: str, tie_weights: bool) -> None:
    torch.manual_seed(0)
    config = replace(SMALL, vocab_size=5003, emb_dim=96, init=init, tie_weights=tie_weights)  # type: ignore[arg-type]
    model = GPTModel(config)
    ids = torch.randint(0, config.vocab_size, (8, 13))
    with torch.no_grad():
        loss = next_token_loss(model(ids[:, :-1]), ids[:, 1:])
    assert loss.item() == pytest.approx(math.log(config.vocab_size), rel=0.03)


def test_gpt2_init_scales_residual_projections() -> None:
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(vocab_size=300, context_length=8, emb_dim=256, n_heads=4, n_layers=8, init="gpt2"))
    block = model.trf_blocks[3]
    assert block.att.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.att.out_proj.weight.std().item() == pytest.approx(0.005, rel=0.02)
    assert block.ff[2].weight.std().item() == pytest.approx(0.005, rel=0.02)
    assert block.ff[2].bias.abs().max() == 0


def test_dropout_works_in_training_only() -> None:
    torch.manual_seed(0)
    model = GPTModel(replace(SMALL, drop_rate=0.5))
    ids = torch.randint(0, SMALL.vocab_size, (2, 12))
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_tied_head_is_the_embedding() -> None:
    model = GPTModel(replace(SMALL, tie_weights=True))
    assert model.out_head.weight is model.tok_emb.weight


def test_a_sequence_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="a sequence of 13 tokens is longer than context_length 12"):
        GPTModel(SMALL)(torch.zeros(1, 13, dtype=torch.int64))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_the_compiled_gelu_is_torchs(dtype: torch.dtype, bound: float) -> None:
    values = torch.linspace(-12, 12, 4001).to(dtype).requires_grad_()
    expected = torch.nn.functional.gelu(values.double(), approximate="tanh")
    (to_values,) = torch.autograd.grad(expected.sum(), values)
    found = torch.compile(GELU())(values)
    (ours,) = torch.autograd.grad(found.float().sum(), values)
    assert torch.allclose(found.double(), expected, atol=bound, rtol=bound)
    assert torch.allclose(ours.double(), to_values.double(), atol=5 * bound, rtol=bound)


@pytest.mark.parametrize("residual_in_fp32", [True, False])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_only_under_bf16_the_residual_stream_can_be_bf16(residual_in_fp32: bool, autocast: torch.dtype | None) -> None:
    torch.manual_seed(0)
    config = GPTConfig(61, 8, 16, 2, n_layers=2, drop_rate=0, init="gpt2", tie_weights=True)
    model = GPTModel(config)
    model.residual_in_fp32 = residual_in_fp32
    seen = []
    for block in model.trf_blocks:
        block.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    ids = torch.randint(61, (2, 8))
    exact = model.hidden(ids)
    assert {*seen} == {torch.float32}
    seen.clear()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        rounded = model.hidden(ids)
    is_bf16 = autocast == torch.bfloat16 and not residual_in_fp32
    assert {*seen} == {torch.bfloat16 if is_bf16 else torch.float32}
    assert (rounded - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="it is a setting for CPUs")
def test_a_compiled_block_saves_few_activations_for_backward() -> None:
    """Its input and the first residual in float32, qkv, attention's output, and GELU's input; no scores, no norms."""
    model = GPTModel(GPTConfig(context_length=256, emb_dim=256, n_heads=4, n_layers=1, drop_rate=0.0))
    recompute_cheap_ops(torch.device("cpu"))
    block = model.trf_blocks[0]
    block.compile()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hidden = torch.randn(2, 256, 256, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(hidden)
    n_bytes = sum(size for address, size in saved.items() if address not in parameters)
    assert 16 < n_bytes / hidden.numel() < 24
