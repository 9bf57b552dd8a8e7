"""Recipes: what the files say is valid, complete, and what was published."""

import pytest
import timm

from bench import models, recipes
from bench.models import preprocessing
from explainer_bench import RequestError

ALL = recipes.names()


@pytest.mark.parametrize("name", ALL)
def test_recipes_name_what_there_is(name):
    recipe = recipes.get(name)
    assert recipe.name == name and recipe.description.endswith(".")
    assert timm.is_model(models.ALIASES.get(recipe.architecture, recipe.architecture))
    assert recipe.preprocessing is None or recipe.preprocessing in preprocessing.VARIANTS
    published = name.startswith(("chung", "komorowski", "goncalves", "brocki"))
    assert bool(recipe.source) == bool(recipe.notes) == published or not published


DATASETS = {"CP-Child": "cp_child", "DUKE": "duke", "Kvasir": "kvasir", "MURA": "mura"}
STARTS = {"Random": "random", "Sup": "supervised", "DINO": "dino", "MAE": "mae"}


def test_the_sixteen_recipes_are_the_published_table(shared):
    text = (shared / "seeds" / "001_44f80b365889263b.txt").read_text()
    rows = [line.split() for line in text.partition("Batch Size\n")[2].partition("\n\n")[0].splitlines()]
    dataset = ""
    for row in rows:
        if row[0] in DATASETS:
            dataset = DATASETS[row.pop(0)]
        start, optimizer, lr, momentum, decay, schedule, epochs, saved, batch = row
        recipe = recipes.get(f"chung2024_{dataset}_{STARTS[start]}")
        spec = "kvasir[task=finding]" if dataset == "kvasir" else dataset  # two classes, as in the others
        assert (recipe.dataset, recipe.architecture) == (spec, "vit_base_patch16_224")
        assert schedule == "CosineAnnealing" and recipe.schedule == "cosine" and recipe.optimizer == optimizer.lower()
        numbers = (recipe.lr, recipe.momentum, recipe.weight_decay, recipe.epochs, recipe.batch_size)
        assert numbers == (float(lr), float(momentum), float(decay), int(epochs), int(batch))
        assert recipe.published_epoch == int(saved) and recipe.patience is None and recipe.decay_vectors
        assert bool(recipe.starts_from) == (start != "Random") and recipe.pooling == ("cls" if start == "MAE" else None)
        whole = dataset in ("cp_child", "duke")
        assert recipe.preprocessing == ("chung2024_resize" if whole else "chung2024_crop")
    assert len(rows) == 16 == sum(name.startswith("chung2024_") for name in ALL)


def test_the_survey_starts_some_models_from_nothing():
    for gate, plain in (("se", True), ("cbam", False)):
        recipe = recipes.get(f"goncalves2022[dataset=isic2020,architecture={gate}_resnet50_goncalves]")
        assert bool(recipe.starts_from) == plain
        assert recipe.checkpoint_name == f"goncalves2022_isic2020_{gate}_resnet50_goncalves"
    assert not recipes.get("goncalves2022[architecture=se_densenet121_goncalves]").starts_from
    assert recipes.get("goncalves2022[architecture=cbam_resnet50_goncalves,init=resnet50]").starts_from == "resnet50"


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("description: Mine.\ndataset: digits[size=9]\narchitecture: resnet18\nepochs: 3\nbatch_size: 4\n")
    recipe = recipes.get(f"{path}[lr=1e-5,augment={{flip: true, shift: [0.1, 0]}}]", epochs=7)
    assert (recipe.name, recipe.epochs, recipe.lr) == ("mine", 7, 1e-5)
    assert recipe.augment.flip and recipe.augment.shift == (0.1, 0) and recipe.checkpoint_name == "mine"


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("digit", "unknown recipe 'digit'. Did you mean digits"),
        ("no.yaml", "no such recipe file: no.yaml"),
        ("digits[epoch=3]", "recipe 'digits' has no parameter 'epoch'. Did you mean epochs"),
        ("digits[learning_rate=1]", "recipe 'digits' has no parameter 'learning_rate'. Did you mean lr?"),
        ("digits[optim=sgd]", "Did you mean optimizer?"),
        ("digits[batch=8]", "Did you mean batch_size?"),
        ("digits[wd=0.1]", "Did you mean weight_decay?"),
        ("digits[max_epochs=3]", "Did you mean epochs?"),
        ("digits[epochs=0]", "recipe 'digits', parameter 'epochs': Input should be greater than 0."),
        ("digits[optimizer=adam,momentum=1]", "parameter 'momentum': Input should be less than 1."),
        ("digits[name=x]", "has no parameter 'name'"),
        ("digits[augment={flop: 1}]", "parameter 'augment.flop': Extra inputs are not permitted"),
        ("digits[class_weights=balanced]", "class_weights belongs to loss=cross_entropy, not to bce"),
        ("digits[model_name='{epoch}']", "{epoch} is neither {architecture} nor {dataset}"),
    ],
)
def test_what_is_wrong_is_one_line(spec, line):
    with pytest.raises(RequestError) as error:
        recipes.get(spec)
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "line"),
    [("a: [", "is no YAML"), ("- a", "write it as a YAML mapping"), ("epochs: 3", "parameter 'description': Field")],
)
def test_a_file_that_is_no_recipe(tmp_path, content, line):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(RequestError, match=line):
        recipes.get(str(tmp_path / "x.yaml"))
