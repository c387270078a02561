"""The published experiments, value by value: tables 1 to 4 of the paper's supplement as the configs give them."""

import dataclasses

import pytest

from bitsperdim import config as config_lib
from bitsperdim import config_files, optim
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError
from vqvae2.config import PriorConfig

PRIORS = {  # table 1 (ImageNet), table 2 (FFHQ)
    ("imagenet", "top"): (1024, 512, 2048, 20, 4, 8, 5, 0.1, 20, None, 1_600_000, 0.18),
    ("imagenet", "bottom"): (512, 512, 1024, 20, 0, None, 5, 0.1, 0, 20, 754_000, 0.18),
    ("ffhq", "top"): (1024, 512, 2048, 20, 4, 8, 5, 0.5, 0, None, 237_000, 0.324),
    ("ffhq", "middle"): (512, 512, 1024, 20, 1, 8, 5, 0.3, 0, 8, 57_400, 0.324),
    ("ffhq", "bottom"): (256, 512, 1024, 10, 0, None, 5, 0.25, 0, 8, 270_000, 0.18),
}
AUTOENCODERS = {  # table 3
    "imagenet": (256, (4, 2), 128, 128, 64, 2, 512, 64, 0.25, 2_207_444),
    "ffhq": (1024, (8, 2, 2), 128, 128, 64, 2, 512, 64, 0.25, 304_741),
}
TABLE_4 = [  # batch, hidden, residual, attention layers
    *((64, 64, 256, 0), (64, 64, 256, 2), (64, 128, 512, 0), (64, 128, 512, 2), (64, 256, 1024, 0), (64, 256, 1024, 2)),
    *((128, 64, 256, 0), (128, 64, 256, 2), (128, 128, 512, 0), (128, 128, 512, 2)),
    *((128, 256, 1024, 0), (128, 256, 1024, 2)),
    *((256, 64, 256, 0), (256, 64, 256, 2), (256, 128, 512, 0), (256, 128, 512, 2)),
    *((256, 256, 1024, 0), (256, 256, 1024, 2)),
    (1024, 512, 2048, 4),
]
IMAGES = 1_281_167


def load(name):
    return run_lib.parse(config_files.load(f"vqvae2_{name}"))[1]


def sizes(section):
    """What tables 1 and 2 list, with the coefficient of the learning rate behind it."""
    model, train = section.model, section.train
    attentions = model.layers // model.attention_every if model.attention_every else 0
    return (
        *(train.batch_size, model.hidden, model.residual, model.layers),
        *(attentions, model.attention_heads if attentions else None, model.filter, model.dropout, model.output_layers),
        *(model.conditioning.blocks if model.conditioning else None, train.steps, section.optim.learning_rate),
    )


@pytest.mark.parametrize(("name", "level"), PRIORS)
def test_a_prior_of_tables_1_and_2(name, level):
    section = load(name).prior(level)
    assert sizes(section) == PRIORS[name, level]
    assert (section.optim.name, section.optim.schedule, section.train.ema_decay) == ("adam", "sqrt", 0.9999)
    if section.model.conditioning:
        widths = section.model.conditioning.widths, section.model.conditioning.bottlenecks
        assert widths == ((1024, 2048, 2048), (256, 512, 512))
    # The peak after 16,000 steps, from the formula by hand.
    rate = optim.schedule(section.optim, section.train.steps)
    peak = {0.18: 6.289e-5, 0.324: 1.132e-4}[section.optim.learning_rate]
    assert float(rate(16_000)) == pytest.approx(peak, rel=1e-3)
    assert max(float(rate(step)) for step in (8000, 15_000, 17_000, 50_000)) < peak


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_an_autoencoder_of_table_3(name):
    config = load(name)
    model, section = config.autoencoder.model, config.autoencoder
    found = config.data.image_size, model.strides, section.train.batch_size, model.hidden, model.residual
    found += model.residual_layers, model.num_codes, model.code_dim, model.commitment, section.train.steps
    assert found == AUTOENCODERS[name]
    assert (section.optim.name, section.optim.learning_rate, section.train.ema_decay) == ("adam", 2e-4, 0.9999)
    assert optim.schedule(section.optim, section.train.steps)(100_000) == pytest.approx(2e-4)


def test_training_images_are_changed_as_in_the_supplement():
    imagenet, ffhq = (load(name).autoencoder.model for name in ("imagenet", "ffhq"))
    assert imagenet.flip and ffhq.flip and load("imagenet").data.train_crop == "random"
    assert not any(dataclasses.astuple(imagenet.colour)[:5])
    assert dataclasses.astuple(ffhq.colour) == (0.08, 0.02, 0.1, 0.1, 0.02, 0.5)


@pytest.mark.parametrize("row", TABLE_4, ids=str)
def test_a_row_of_table_4_and_its_two_columns(row):
    batch, hidden, residual, attentions = row
    section = load("imagenet:table4_b{}_h{}_r{}_a{}".format(*row)).top
    assert sizes(section)[:5] == (batch, hidden, residual, 20, attentions)
    assert section.optim.hidden_units == hidden
    assert section.model.reading == ("auto" if row == TABLE_4[-1] else "causal")  # alike with and without attention
    steps = dict(section.train.milestones)
    assert steps["1m_steps"] == 1_000_000
    assert steps["64_epochs"] * batch / IMAGES == pytest.approx(64, abs=1e-3)
    assert section.train.steps == max(steps.values())


def test_there_are_nineteen_rows_and_no_other():
    assert len(TABLE_4) == 19
    with pytest.raises(InputError, match="no row b64_h64_r256_a4 in Table 4; there are b64_h64_r256_a0"):
        load("imagenet:table4_b64_h64_r256_a4")


@pytest.mark.parametrize("dim", [None, 8, 16, 32, 64])
def test_a_row_of_table_5(dim):
    """128 pixels, one map of 32x32; a prior of 256 hidden units, two attentions, batch 256, ten logistics."""
    config = load(f"imagenet:table5_{f'ae{dim}' if dim else 'vq'}")
    model, section = config.autoencoder.model, config.top
    assert (config.levels, config.data.image_size, model.strides) == (("top",), 128, (4,))
    found = model.quantizer, model.code_dim, model.num_codes, model.cell
    assert found == (("none", dim, 256, (dim,)) if dim else ("ema", 64, 512, ()))
    assert sizes(section)[:5] == (256, 256, 1024, 20, 2)
    # All rows have attention, so none needs the dense layers with which Table 4 compares.
    assert (section.model.mixtures, section.model.reading) == (10, "auto")


@pytest.mark.parametrize("name", ["imagenet", "ffhq"])
def test_the_paper_has_batch_normalisation_and_no_revival_and_needs_whole_batches_for_it(name):
    ours, paper = load(name), load(f"{name}:paper")
    assert paper.autoencoder.model.revival_threshold == 0 < ours.autoencoder.model.revival_threshold
    for level in paper.levels[1:]:
        norms = [config.prior(level).model.conditioning.norm for config in (ours, paper)]
        assert norms == ["group", "batch"]
    assert not any(section.train.ema_ramp for section in (paper.autoencoder, *map(paper.prior, paper.levels)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention_every": 21}, r"attention_every must be at most layers=20, or 0 for no attention, not 21"),
        ({"attention_every": 5, "attention_features": 0}, r"attention_features must be a positive multiple of"),
        ({"attention_every": 5, "attention_features": 12}, r"multiple of attention_heads=8, not 12"),
        ({"reading": "masked"}, "reading must be one of auto, quadrant, causal, not 'masked'"),
        ({"attention_dropped": "keys"}, "attention_dropped must be one of probabilities, logits, not 'keys'"),
        ({"filter": 4}, "filter must be odd and at least 3, not 4"),
    ],
)
def test_a_prior_that_cannot_be_is_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        PriorConfig(**values)


@pytest.mark.parametrize(
    ("level", "conditioning", "message"),
    [
        ("top", {"blocks": 1}, "top.model.conditioning must be None: there are no codes above, not a section"),
        ("bottom", None, "bottom.model.conditioning must be a section: there are codes above, not None"),
    ],
)
def test_codes_above_need_a_section_for_them_and_no_others_have_one(level, conditioning, message):
    values = config_lib.to_plain(config_files.load("vqvae2_photos:tiny").to_dict())
    values[level]["model"]["conditioning"] = conditioning
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        run_lib.parse(values)


def test_the_table_of_sizes_has_every_config_and_refuses_names_that_there_are_not(benchmark):
    script = benchmark("sizes")
    choose, published = script.chosen, dict(script.published())
    names = {name.split(":")[0] for name in published}
    assert names == {name for name in config_files.names() if name.startswith("vqvae2_")}
    assert choose(["vqvae2_ffhq"], ["middle", "bottom"]) == [("vqvae2_ffhq", ["middle", "bottom"])]
    assert choose(None, None) == [(name, list(stages)) for name, stages in published.items()]
    with pytest.raises(InputError, match="there is no config 'vqvae2_fhq' here; did you mean 'vqvae2_ffhq'"):
        choose(["vqvae2_fhq"], None)
    with pytest.raises(InputError, match="there is no stage 'buttom' here; did you mean 'bottom'"):
        choose(None, ["buttom"])
