"""Images for training: any folder, or any data set that timm reads; what is drawn follows from the seed alone."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm.data
import torch
from PIL import Image
from timm.data.dataset import ImageDataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.transforms import v2

from sparsifiner_edge.distill.recipe import Images
from sparsifiner_edge.errors import ConfigError, ImageError, SparsifinerError
from sparsifiner_edge.images import class_order, decode_image, evenly, list_images, open_image


class Batch(NamedTuple):
    """Images uint8 [B,3,S,S], labels int64 [B] (-1: none), their files, and files that could not be read."""

    images: Tensor
    labels: Tensor
    files: tuple[str, ...]
    unreadable: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """Where images come from.

    Attributes:
        train: files, or a data set of timm. held_out: files that are not trained on.
        root, held_out_root: the folders that they lie in.
        labels: the class of each file, where a folder is labelled. classes: their names.
        labelled: whether labels count. name: of a data set.
        renumbered: the student's number of each class of a data set, where it counts them otherwise; empty: as it does.
    """

    train: Sequence[Path] | Any
    held_out: tuple[Path, ...]
    root: Path
    held_out_root: Path
    labels: tuple[int, ...] = ()
    classes: tuple[str, ...] = ()
    labelled: bool = False
    name: str = ""
    renumbered: Mapping[int, int] = dataclasses.field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Tells whether a training resumes on the images that it began with, wherever they lie by now.

        Of files their names below their folder and their sizes; of a data set that names no files, what it is called.
        """
        length = len(self.train) if hasattr(self.train, "__len__") else "endless"
        lines = [f"{self.name} {length} {self.labelled} {sorted(self.renumbered.items())}", *map(str, self.labels)]
        reader = getattr(self.train, "reader", None)
        if isinstance(self.train, list):
            lines += [_name_and_size(path, self.root) for path in self.train]
        elif isinstance(reader, ReaderImageFolder):
            lines += [_name_and_size(Path(path), self.root) for path, _ in reader.samples]
        lines += [_name_and_size(path, self.held_out_root) for path in self.held_out]
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()

    def __len__(self) -> int:
        return len(self.train)

    def label(self, given: Any, classes: int, name: str) -> int:
        """The student's number of a data set's class; -1: none.

        Raises:
            ConfigError: labels count, and the student, of so many classes, has none for this image.
        """
        label = -1 if given is None else self.renumbered.get(int(given), int(given))
        if self.labelled and not 0 <= label < classes:
            raise ConfigError(
                f"{name} has the label {label}; the student knows {classes} classes.", "Leave --labels out."
            )
        return label


def _name_and_size(path: Path, root: Path) -> str:
    """A file's name below a folder, and its size; a folder may be named in many ways, and moved."""
    try:
        size = path.stat().st_size
    except OSError:  # Gone since it was listed: whoever reads it says so.
        size = -1
    return f"{os.path.relpath(path, root)} {size}"


def folder_source(
    folder: Path, count: int, labelled: bool, held_out: Path | None, classifier: tuple[str, ...] = ()
) -> ImageSource:
    """Every image below a folder, `count` of them evenly taken and held out unless a folder of them is given.

    Args:
        labelled: the name of the folder below `folder` is an image's class.
        classifier: its labels, in its order; see `class_order`.

    Raises:
        ImageError: no images, or too few.
        ConfigError: labelled, and an image lies in no folder of its own.
    """
    files = list_images(folder)
    kept = list_images(held_out) if held_out is not None else evenly(files, min(count, max(1, len(files) // 5)))
    taken = {path.resolve() for path in kept}
    train = [path for path in files if path.resolve() not in taken]
    kept = evenly(kept, count)
    if not train:
        raise ImageError(f"{folder} holds {len(files)} images, all of which are held out.", "Give more images.")
    roots = (folder, folder if held_out is None else held_out)
    if not labelled:
        return ImageSource(train, tuple(kept), *roots)
    parts = {path: path.relative_to(folder).parts for path in files}
    if folder.is_file() or any(len(part) < 2 for part in parts.values()):
        raise ConfigError(f"{folder} holds images in no folder of their class.", "Sort them, or leave --labels out.")
    classes = class_order((part[0] for part in parts.values()), classifier)  # those held out are of classes too
    numbers = {name: number for number, name in enumerate(classes)}
    labels = tuple(numbers[parts[path][0]] for path in train)
    return ImageSource(train, tuple(kept), *roots, labels, classes, labelled=True)


def timm_source(
    name: str, root: Path, count: int, labelled: bool, held_out: Path | None, classifier: tuple[str, ...] = ()
) -> ImageSource:
    """A data set by timm's name, such as "wds/mine" or "hfds/..."; see timm's `create_dataset`.

    Args:
        classifier: its labels, in its order; where the data set names its classes, they are numbered as these are.

    Raises:
        ConfigError: timm cannot make it, nothing is held out, images of the data set itself are, or some of its
            classes are the classifier's and others are not.
    """
    try:
        dataset = timm.data.create_dataset(name, root=str(root), split="train", is_training=True, batch_size=1)
    # Each reader raises its own kinds of error; all mean that there is no such data set.
    except Exception as error:
        raise ConfigError(f"timm cannot read the data set {name!r} at {root}: {error}.", "Check both.") from error
    if held_out is None:
        raise ConfigError(f"The data set {name!r} has no images held out.", "Give a folder of some: --held-out DIR.")
    kept = evenly(list_images(held_out), count)
    reader = getattr(dataset, "reader", None)
    own = Path(reader.root).resolve() if isinstance(reader, ReaderImageFolder) else None
    if own and any(path.resolve().is_relative_to(own) for path in kept):
        raise ConfigError(f"{held_out} lies in the data set itself.", "Hold out images that are not trained on.")
    numbers = _renumbered(dataset, classifier) if labelled else {}
    return ImageSource(dataset, tuple(kept), root, held_out, labelled=labelled, name=name, renumbered=numbers)


def _renumbered(dataset: Any, classifier: tuple[str, ...]) -> dict[int, int]:
    """timm's number of each class -> the student's: timm counts folders by the numbers in their names."""
    reader = getattr(dataset, "reader", None)
    named = getattr(dataset if reader is None else reader, "class_to_idx", None)
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named):
        return {}
    if not isinstance(reader, ReaderImageFolder) and not set(named) & set(classifier):
        return {}  # a data set's own order
    order = class_order(named, classifier)
    return {number: order.index(name) for name, number in named.items()}


def augmentation(size: int, images: Images) -> v2.Transform:
    """PIL image -> uint8 [3,S,S]."""
    bicubic = v2.InterpolationMode.BICUBIC
    crop: list[Any] = [v2.Resize(size, bicubic, antialias=True), v2.CenterCrop(size)]
    if images.smallest_crop < 1:
        crop = [v2.RandomResizedCrop(size, (images.smallest_crop, 1.0), interpolation=bicubic, antialias=True)]
    return v2.Compose([*crop, *([v2.RandomHorizontalFlip()] if images.flip else []), v2.PILToTensor()])


Sample = tuple[Tensor, int, str, tuple[str, ...]]
"""An image uint8 [3,S,S], its label (-1: none), its file, and files before it that could not be read."""


class ShuffledBatches(Dataset[Batch | SparsifinerError]):
    """Endless passes over the images, each in an order of its own: sample n is the n-th image of the training.

    Indexed by the numbers of a batch's samples.
    """

    def __init__(self, source: ImageSource, transform: Any, seed: int, classes: int = 0) -> None:
        self.source, self.transform, self.seed, self.classes = source, transform, seed, classes
        self._order: tuple[int, list[int]] = (-1, [])

    def __getitem__(self, numbers: list[int]) -> Batch | SparsifinerError:
        return _batch(map(self.sample, numbers))

    def sample(self, number: int) -> Sample:
        """The n-th image.

        Raises:
            ImageError: none can be read. ConfigError: the student does not know its class.
        """
        count = len(self.source)
        unreadable: list[str] = []
        for further in range(count):  # an unreadable image gives its place to the next one
            index = self._index(number // count, (number + further) % count)
            try:
                image, label, name = self._read(index)
            except ImageError:
                unreadable.append(self._name(index))
                continue
            return seeded(self.transform, image, self.seed + number), label, name, tuple(unreadable)
        raise ImageError(f"None of the {count} images can be read.", f"Look at {unreadable[0]}, for instance.")

    def _index(self, epoch: int, place: int) -> int:
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed + 1_000_003 * (epoch + 1))
            self._order = (epoch, torch.randperm(len(self.source), generator=generator).tolist())
        return self._order[1][place]

    def _name(self, index: int) -> str:
        train: Any = self.source.train
        if isinstance(train, list):
            return str(train[index])
        return str(train.filename(index)) if hasattr(train, "filename") else f"image {index}"

    def _read(self, index: int) -> tuple[Any, int, str]:
        train: Any = self.source.train
        if isinstance(train, list):
            label = self.source.labels[index] if self.source.labels else -1
            return open_image(train[index]), label, self._name(index)
        name = self._name(index)
        try:
            # Past timm's own class, which gives the next image in place of a broken one and does not say so.
            file, label = (train.reader if isinstance(train, ImageDataset) else train)[index][:2]
        except Exception as error:  # whatever timm's reader raises
            raise ImageError(f"{name} cannot be read: {error}.", "Replace or remove it.") from error
        try:
            image = file.convert("RGB") if isinstance(file, Image.Image) else decode_image(file, name)
        finally:
            if hasattr(file, "close"):  # timm leaves it open
                file.close()
        return image, self.source.label(label, self.classes, name), name


def seeded(transform: Any, image: Any, seed: int) -> Tensor:
    """A transform whose draws follow from `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast(Tensor, transform(image))


class StreamedBatches(IterableDataset[Batch | SparsifinerError]):
    """A data set that can only be read on, again and again: WebDataset and the like, in timm's order."""

    def __init__(self, source: ImageSource, transform: Any, seed: int, classes: int = 0, batch: int = 1) -> None:
        self.source, self.transform, self.seed, self.classes, self.batch = source, transform, seed, classes, batch

    def __iter__(self) -> Iterator[Batch | SparsifinerError]:
        samples = self.samples()
        while isinstance(batch := _batch(itertools.islice(samples, self.batch)), Batch):
            yield batch
        yield batch

    def samples(self) -> Iterator[Sample]:
        """Images without end.

        Raises:
            ImageError: there is none. ConfigError: the student does not know a class.
        """
        number = before = 0
        while True:
            for image, given in self._once():
                name = f"image {number} of the stream"
                label = self.source.label(given, self.classes, name)
                yield seeded(self.transform, image.convert("RGB"), self.seed + number), label, name, ()
                number += 1
            if number == before:
                raise ImageError(f"The data set {self.source.name!r} gives no image.", "Look at its files.")
            before = number

    def _once(self) -> Iterator[tuple[Any, Any]]:
        try:
            yield from cast(Any, self.source.train)
        except Exception as error:  # whatever timm's reader raises
            raise ImageError(
                f"The data set {self.source.name!r} cannot be read on: {error}.", "Look at its files."
            ) from error


def _batch(samples: Iterable[Sample]) -> Batch | SparsifinerError:
    """A batch; what ends a training is returned: a worker process that raised it would show its traceback instead."""
    try:
        images, labels, files, unreadable = zip(*samples, strict=True)
    except SparsifinerError as error:
        return error
    return Batch(torch.stack(images), torch.tensor(labels), files, tuple(itertools.chain(*unreadable)))


def _unchanged(batch: Any) -> Any:
    return batch


def batches(
    source: ImageSource,
    transform: Any,
    *,
    seed: int,
    batch: int,
    first: int,
    process: int,
    processes: int,
    workers: int,
    classes: int = 0,
) -> Iterator[Batch]:
    """Endless batches of one process, from the `first` pass of all processes on.

    Together the processes draw what one process would with batches as large as all of theirs.

    Raises:
        SparsifinerError: by the iterator: an image, or all of them, cannot be trained on.
    """
    dataset: Any = ShuffledBatches(source, transform, seed, classes)
    places: Any = (
        list(range(start, start + batch))
        for start in itertools.count((first * processes + process) * batch, processes * batch)
    )
    if isinstance(source.train, IterableDataset):
        # The data set deals its images out to the processes by itself.
        dataset, places = StreamedBatches(source, transform, seed + 1_000_003 * process, classes, batch), None
    loader = DataLoader(
        dataset, None, sampler=places, num_workers=workers, collate_fn=_unchanged, persistent_workers=workers > 0
    )
    for found in loader:
        if isinstance(found, SparsifinerError):
            raise found
        yield found
