"""The Hugging Face Trainer takes the wrapped optimizer by `optimizers=`, and prepares it by Accelerate."""

import pytest
import torch
import transformers
from loops import CHAINS, assert_same, optimizer_and_scheduler, train

STEPS, BATCH_SIZE = 8, 4


def bert():
    """Two layers, from a configuration: nothing is downloaded."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,  # at 0.02 the inputs of some layers hardly vary, and rounding shows
        num_labels=3,
    )
    model = transformers.BertForSequenceClassification(config)
    # its loss is a mean whatever the Trainer passes: without this the micro-batches are summed, not averaged
    model.accepts_loss_kwargs = False
    return model


def examples(accumulate=1):
    generator = torch.Generator().manual_seed(1)
    n = STEPS * BATCH_SIZE * accumulate
    tokens = torch.randint(0, 20, (n, 6), generator=generator)
    labels = torch.randint(0, 3, (n,), generator=generator)
    return [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]


def plain(chain, *, accumulate=1, clip=None):
    model = bert()
    optimizer, scheduler = optimizer_and_scheduler(model, CHAINS[chain](), lr=1e-3)
    batches = torch.utils.data.DataLoader(examples(accumulate), batch_size=BATCH_SIZE)
    train(model, optimizer, scheduler, batches, loss=lambda b: model(**b).loss, accumulate=accumulate, clip=clip)
    return model, optimizer


def fit(tmp_path, chain, *, accumulate=1, clip=0.0, resume=None, **options):
    """What the Trainer makes: the model and the optimizer that was given to it."""
    model = bert()
    optimizer, scheduler = optimizer_and_scheduler(model, CHAINS[chain](), lr=1e-3)
    settings = {"save_strategy": "no", **options}
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path,
        use_cpu=True,
        num_train_epochs=1,
        per_device_train_batch_size=BATCH_SIZE,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=clip,
        train_sampling_strategy="sequential",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=examples(accumulate), optimizers=(optimizer, scheduler)
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, optimizer


@pytest.mark.parametrize("chain", CHAINS)
def test_equals_the_plain_loop(tmp_path, chain):
    model, optimizer = fit(tmp_path, chain)
    assert_same((model, optimizer), plain(chain))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_accumulation_and_clipping_equal_the_plain_loop(tmp_path, accumulate, clip):
    actual = fit(tmp_path, "bnp", accumulate=accumulate, clip=clip or 0.0)
    assert_same(actual, plain("bnp", accumulate=accumulate, clip=clip))


@pytest.mark.parametrize("chain", CHAINS)
def test_resumed_from_its_checkpoint_equals_uninterrupted(tmp_path, chain):
    uninterrupted = fit(tmp_path, chain, save_strategy="steps", save_steps=STEPS // 2)
    resumed = fit(tmp_path, chain, resume=tmp_path / f"checkpoint-{STEPS // 2}")
    assert_same(resumed, uninterrupted, rtol=0, atol=0)


def test_every_layer_with_rows_is_conditioned_and_the_rest_is_reported(tmp_path):
    _, optimizer = fit(tmp_path, "bnp")
    report = optimizer.report()
    linear = 2 * 6 + 2  # four in attention, two after it; the pooler and the classifier
    assert len(report.conditioned) == linear + 3  # the embeddings of words, positions and types
    assert set(report.left_alone.values()) == {"LayerNorm has no adapter"}
