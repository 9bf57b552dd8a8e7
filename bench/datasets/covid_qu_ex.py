"""COVID-QU-Ex: chest radiographs of COVID-19, other pneumonia and normal lungs, with lung and infection masks."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from bench.datasets.files import FileDataset, Found, class_folders, contents, images, paired
from explainer_bench import RequestError

MASKS = {"infection": ("infection", "lung"), "lung": ("lung",)}  # the regions that each tree has masks of


class CovidQuEx(FileDataset):
    """The chest radiographs of COVID-QU-Ex (Tahir et al., 2021), in either of the archive's two trees.

    Only the files of the folders `images` are images: the masks that lie beside them are never read as such.

    Parameters
    ----------
    root : Path
        The folder that holds `Infection Segmentation Data` and `Lung Segmentation Data`, or the one above it.
    split : {"train", "val", "test"}
        Which part, as published.
    part : {"infection", "lung"}
        The smaller tree, with infection and lung masks, or the larger, with lung masks only.
    """

    name = "covid_qu_ex"
    class_names = ("COVID-19", "Non-COVID", "Normal")
    regions = ("infection", "lung")
    folder = "COVID-QU-Ex Dataset"
    licence: ClassVar[str] = "as its Kaggle page says (not verified); cite Tahir et al., CBM 139:105002"
    where: ClassVar[str] = "https://www.kaggle.com/datasets/anasmohammedtahir/covidqu"
    tree: ClassVar[str] = (
        "{Infection,Lung} Segmentation Data/{Infection,Lung} Segmentation Data/{Train,Val,Test}/"
        "{COVID-19,Non-COVID,Normal}/{images,lung masks,infection masks}/*.png"
    )
    counts: ClassVar[str] = (
        "lung tree 33,920 images: 11,956 COVID-19, 11,263 Non-COVID, 10,701 Normal; infection tree 2,913, 1,457 and "
        "1,456 (the latter from memory, not verified)"
    )
    splitting: ClassVar[str] = (
        "published Train, Val and Test: COVID-19 7,658, 1,903 and 2,395, Non-COVID 7,208, 1,802 and 2,253, Normal "
        "6,849, 1,712 and 2,140 (from memory, not verified; they add up)"
    )
    labelling: ClassVar[str] = "the class folder; Non-COVID is other viral and bacterial pneumonia"
    roi_rule: ClassVar[str] = (
        "region infection (the ROI): the infection mask, for class COVID-19; its masks are all zero for the other "
        "classes, which therefore have none, as has the whole lung tree. Region lung: the lung mask, for the image's "
        "own class"
    )
    faults: ClassVar[str] = (
        "the classes come from different sources, so a model can tell them by hospital, machine and burnt-in letters; "
        "patients are not named; many masks were drawn by networks and corrected by physicians (from memory, not "
        "verified)"
    )
    reference = "https://doi.org/10.1016/j.compbiomed.2021.105002"

    part: Literal["infection", "lung"] = "infection"

    @property
    def required(self) -> tuple[str, ...]:
        """The tree of `part`, whose folder the archive holds twice, one in the other."""
        return ("/".join([f"{self.part.capitalize()} Segmentation Data"] * 2),)

    def find(self, folder: Path) -> list[Found]:
        """Return the images of the tree with their masks."""
        return [
            item
            for _, split in class_folders(folder / self.required[0], ("Train", "Val", "Test"))
            for label, path in class_folders(split, self.class_names)
            for item in self._images(path, label, split.name)
        ]

    def _images(self, folder: Path, label: int, split: str) -> list[Found]:
        if not (folder / "images").is_dir():
            raise RequestError(f"{folder} has no folder 'images': {contents(folder)}.")
        files = images(folder / "images")
        masks = {region: paired(files, folder / f"{region} masks") for region in MASKS[self.part]}
        return [
            Found(
                f"{split}/{folder.name}/{file.stem}",
                label,
                file,
                tuple((region, paths[i]) for region, paths in masks.items()),
                split=split.lower(),
            )
            for i, file in enumerate(files)
        ]
