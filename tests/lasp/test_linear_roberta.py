"""Linear-RoBERTa: tokens that see the whole of their document, and the loss of the masked ones."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")
models = pytest.importorskip("lasp.models")

LENGTH = 12
patterns = pytest.mark.parametrize("pattern", ["L", "LN", "N"])
FIELDS = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def small(pattern: str = "LN", **overrides: object) -> "models.LinearRobertaForMaskedLM":
    torch.manual_seed(0)
    config = models.LinearRobertaConfig(**{**FIELDS, "pattern": pattern, "initializer_range": 0.3, **overrides})
    return models.LinearRobertaForMaskedLM(config).double().eval()


def text(batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 61, (batch, length))


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_loss_is_the_mean_over_masked_tokens() -> None:
    model, ids = small(), text()
    masked = torch.rand(ids.shape) < 0.4
    labels = ids.masked_fill(~masked, -100)
    output = model(ids.masked_fill(masked, 60), labels=labels)
    expected = F.cross_entropy(output.logits[masked], ids[masked])
    close(output.loss, expected)
    close(model(ids.masked_fill(masked, 60), shift_labels=labels).loss, expected)
    loss, logits = model(ids.masked_fill(masked, 60), labels=labels, num_items_in_batch=1, return_dict=False)
    close(loss, expected * masked.sum())
    assert torch.equal(logits, output.logits)


@patterns
def test_every_token_sees_all_others_and_their_order(pattern: str) -> None:
    model = small(pattern)
    embeds = model.get_input_embeddings()(text()).detach().requires_grad_()
    logits = model(inputs_embeds=embeds).logits
    for token in (0, LENGTH - 1):
        (grad,) = torch.autograd.grad(logits[:, token].square().sum(), embeds, retain_graph=True)
        assert (grad.abs().sum(-1) > 0).all()
    swapped = torch.cat((embeds[:, :1], embeds[:, 1:].flip(1)), 1)
    assert (model(inputs_embeds=swapped).logits[:, 0] - logits[:, 0]).abs().max() > 1e-3


@patterns
def test_packed_documents_equal_separate_ones(pattern: str) -> None:
    model, ids = small(pattern), text(batch=1)
    packed = model(ids, cu_seqlens=torch.tensor([0, 5, 5, LENGTH])).logits
    close(packed, torch.cat((model(ids[:, :5]).logits, model(ids[:, 5:]).logits), 1))


@patterns
def test_padding_changes_no_real_token(pattern: str) -> None:
    model, ids = small(pattern), text(batch=1)
    padded = torch.cat((ids[:, :1].expand(-1, 3), ids, ids[:, :2]), 1)
    mask = torch.tensor([[0] * 3 + [1] * LENGTH + [0] * 2])
    close(model(padded, attention_mask=mask).logits[:, 3:-2], model(ids).logits)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_changes_no_gradient() -> None:
    model, ids = small().train(), text()
    gradients = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.abs().sum() > 0
        assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"mixer": "lightning"},
            "'lightning' knows only the past.*one of: based, hedgehog, inline, linear, rebased, softmax",
        ),
        ({"pattern": ["linear", "retention"]}, "'retention' knows only the past"),
        ({"mixer_options": {"softmax": {"causal": True}}}, "'causal'"),
        ({"pattern": "N", "mixer_options": {"softmax": {"window": 4}}}, "got 4 and causal=False"),
        ({"rope_theta": -1.0}, "got -1.0"),
    ],
)
def test_mistakes_in_the_configuration_are_value_errors(fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        models.LinearRobertaForMaskedLM(models.LinearRobertaConfig(**FIELDS, **fields))


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"inputs_embeds": torch.zeros(2, LENGTH, 32)}, "exactly one"),
        ({"attention_mask": torch.ones(2, 3)}, "\\(2, 3\\)"),
        ({"labels": text()[:, 1:]}, "got \\[2, 11\\]"),
    ],
)
def test_mistakes_in_calling_are_value_errors(keywords: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small()(text(), **keywords)


def test_the_default_is_the_size_of_roberta_base() -> None:
    with torch.device("meta"):
        model = models.LinearRobertaForMaskedLM(models.LinearRobertaConfig())
    assert model.num_parameters() == pytest.approx(125e6, rel=0.02)


@pytest.mark.parametrize("tied", [True, False])
def test_saving_and_loading_keeps_every_bit(tied: bool, tmp_path: Path) -> None:
    model = small(tie_word_embeddings=tied, rope_theta=3e4).float()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is models.LinearRobertaForMaskedLM
    assert loaded.model.layers[1].mixer.rotary.theta == 3e4
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    state = loaded.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    close(loaded(text()).logits, model(text()).logits, 1e-5)  # of other addresses in memory; fp32
    assert type(transformers.AutoModel.from_pretrained(tmp_path)) is models.LinearRobertaModel
